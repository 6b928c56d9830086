"""A bundle's folder → its manifest, once its files are accounted for and its signer is trusted.

No graph is read here: `HeldFiles` compares those that will run with their SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .contents import check_contents
from .manifest import Manifest, read_manifest
from .opened import HeldFiles
from .recovery import tidy
from .trust import Trust, check_trust
from .trusted_keys import KeyPaths, configured_keys

NATIVE_CODE = ("engines", "kernels")
"""Folders of files that are not in the manifest and run on a GPU."""


@dataclass(frozen=True, kw_only=True)
class CheckedBundle:
    """A bundle that may be opened."""

    path: Path
    manifest: Manifest
    added: tuple[str, ...]
    """Paths of the files that stages have added since the export."""
    trust: Trust

    def check_additions(self) -> None:
        """SignatureError unless every added file is signed, if keys are configured."""
        for path in self.added:
            self.trust.check_addition(self.path, path)

    def native_code(self) -> Iterator[str]:
        """Paths of the engines and cubins, with the files that describe them."""
        return (path for path in self.added if path.split("/")[0] in NATIVE_CODE)

    def hold_native_code(self, held_files: HeldFiles) -> None:
        """Keep engines and cubins open; SignatureError if one is not the file that was signed."""
        for path in self.native_code():
            self.trust.check_addition(self.path, path)
            held_files.add(path, self.trust.additions.get(path, ()))


def check_changeable(bundle: Path) -> None:
    """Refuse to change or to measure a bundle that no configured key has signed.

    Errors as for `check_bundle`. Every added file is read. Without keys nothing is checked here.
    """
    if configured_keys(None):
        check_bundle(bundle).check_additions()


def check_bundle(bundle: Path, trusted: KeyPaths | None = None) -> CheckedBundle:
    """A bundle's manifest, after its folder and its signatures were checked.

    Temporary files that killed commands left are removed. `trusted`: see `configured_keys`.
    BundleError for a bundle that cannot be used, SignatureError for one that no trusted key has
    signed, UsageError for keys that cannot be used.
    """
    key_sets = configured_keys(trusted)
    tidy(bundle)
    manifest, digest = read_manifest(bundle)
    added = check_contents(manifest, bundle)
    return CheckedBundle(
        path=bundle,
        manifest=manifest,
        added=tuple(added),
        trust=check_trust(bundle, manifest, digest, added, key_sets),
    )
