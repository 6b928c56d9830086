"""A bundle and the keys that its user trusts → who signed it, or a refusal.

One trusted signature must cover the manifest and every file that it lists. Files that stages have
added since may be covered by the same signature or by another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medsa_deploy.errors import SignatureError

from .files import sha256
from .manifest import Manifest
from .manifest_text import MANIFEST_FILENAME
from .signature import Signature, read_signature, signature_paths, signed_files
from .trusted_keys import KeySet, TrustedKey


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The signatures that cover a bundle's files."""

    signers: tuple[str, ...] = ()
    """Fingerprints of the trusted keys that signed manifest and files; empty: no keys are
    configured, and nothing was checked."""
    additions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Path of each file that a stage has added → the SHA-256 that trusted keys have signed."""

    def check_addition(self, bundle: Path, path: str) -> None:
        """SignatureError unless an added file's content is signed. Reads every byte of it."""
        if self.signers and sha256(bundle / path) not in self.additions[path]:
            raise SignatureError(
                f"{bundle}: {path!r} is not the file that was signed: build it again, and sign the "
                "bundle again with medsa-deploy sign"
            )


def check_trust(
    bundle: Path,
    manifest: Manifest,
    manifest_sha256: str,
    added: Iterable[str],
    key_sets: Sequence[KeySet],
) -> Trust:
    """Who signed a bundle; SignatureError unless a key of every set did.

    `manifest_sha256`: of the bytes that `manifest` was read from. `added`: paths of the files that
    the manifest does not list. Files are not read: the manifest's hashes are compared with the
    signed ones, and the files with the manifest when they are loaded.
    """
    if not key_sets:
        return Trust()
    signatures = [read_signature(path) for path in signature_paths(bundle)]
    listed = {file.path: file.sha256 for file in manifest.files}
    listed[MANIFEST_FILENAME] = manifest_sha256
    signers: dict[str, None] = {}
    allowed: dict[str, frozenset[str]] = {}
    for key_set in key_sets:
        statements = _statements(signatures, key_set)
        whole_signers = [key for key, files in statements if listed.items() <= files.items()]
        if not whole_signers:
            raise SignatureError(_unsigned(bundle, key_set, signatures, statements, listed))
        signers |= dict.fromkeys(key.fingerprint for key in whole_signers)
        for path in added:
            digests = frozenset(files[path] for _, files in statements if path in files)
            if not digests:
                raise SignatureError(
                    f"{bundle}: {path!r} was added and is covered by no signature of "
                    f"{key_set.place}: sign the bundle again with medsa-deploy sign, or delete the "
                    "file"
                )
            allowed[path] = allowed.get(path, digests) & digests
    return Trust(signers=tuple(signers), additions=allowed)


def _statements(
    signatures: Sequence[Signature], key_set: KeySet
) -> list[tuple[TrustedKey, dict[str, str]]]:
    """Keys of a set, each with the files that it has signed."""
    pairs = ((key, signature) for signature in signatures for key in key_set.keys)
    statements = ((key, signed_files(signature, key)) for key, signature in pairs)
    return [(key, files) for key, files in statements if files is not None]


def _unsigned(
    bundle: Path,
    key_set: KeySet,
    signatures: Sequence[Signature],
    statements: Sequence[tuple[TrustedKey, dict[str, str]]],
    listed: Mapping[str, str],
) -> str:
    """Why a bundle is not signed by a key of a set, in words."""
    advice = "get the bundle and its signature again from who signed it"
    if not signatures:
        return f"{bundle} has no signature beside it, and {key_set.place} asks for one: {advice}"
    if not statements:
        names = ", ".join(signature.path.name for signature in signatures)
        return f"{bundle}: no key of {key_set.place} has signed it ({names}): {advice}"
    _, files = statements[0]
    for path, digest in sorted(listed.items()):
        if path not in files:
            return f"{bundle}: {path!r} is not among the files that were signed: {advice}"
        if files[path] != digest:
            return f"{bundle}: {path!r} is not the file that was signed: {advice}"
    raise AssertionError("a statement covers the files")
