"""New files and the manifest that lists them → an existing bundle: both change, or neither.

A manifest is replaced in one step, files are not. So a note of the moves is on the disk before the
first: if a command is killed between them, `bundle/recovery.py` undoes or finishes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medsa_deploy.errors import UsageError

from .atomic import write_text
from .durable import sync_file, sync_folder
from .leftovers import temporary_name
from .lock import changing
from .manifest import MANIFEST_FILENAME, Manifest, load_manifest, manifest_to_json
from .recovery import EARLIER, NOTE_FILENAME, finish_or_undo, recover_all


@contextmanager
def work_folder(bundle: Path) -> Iterator[Path]:
    """A temporary folder inside `bundle` for files that `add_files` will move into the bundle.

    Until the end no other command may change the bundle. The folder and everything still in it are
    removed at the end. UsageError if it cannot be made, or if another command changes the bundle.
    """
    with changing(bundle):
        recover_all(bundle)
        folder = bundle / temporary_name(".tmp")
        try:
            try:
                folder.mkdir()
            except OSError as e:
                raise UsageError(
                    f"{bundle} cannot be written to ({e.strerror}): change its permissions, or "
                    "copy it to a folder of yours"
                ) from e
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def add_files(bundle: Path, files: Sequence[Path], manifest: Manifest) -> None:
    """Move `files` from a work folder into `bundle` and save its new `manifest`.

    Files of the same name are replaced. Files that only the earlier manifest lists are removed. If
    a step fails, the earlier files and the earlier manifest are put back.
    """
    if not files:
        write_text(bundle / MANIFEST_FILENAME, manifest_to_json(manifest))
        return
    text, work = manifest_to_json(manifest), files[0].parent
    names = [file.name for file in files]
    listed = {entry.path for entry in manifest.files}
    obsolete = sorted({entry.path for entry in load_manifest(bundle).files} - listed)
    for file in files:
        sync_file(file)
    note = {
        "moves": names,
        "obsolete": obsolete,
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_text(work / NOTE_FILENAME, json.dumps(note))
    try:
        for name in names:
            if (bundle / name).exists():
                (bundle / name).replace(work / f"{name}{EARLIER}")
            (work / name).replace(bundle / name)
        sync_folder(bundle)
        write_text(bundle / MANIFEST_FILENAME, text)
    except BaseException:
        finish_or_undo(work)
        raise
    finish_or_undo(work)
