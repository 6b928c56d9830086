"""A bundle and a private key → a signature beside the bundle, over every file in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medsa_deploy.bundle.atomic import write_text
from medsa_deploy.bundle.contents import check_contents
from medsa_deploy.bundle.files import check_files, sha256
from medsa_deploy.bundle.lock import changing
from medsa_deploy.bundle.manifest import read_manifest
from medsa_deploy.bundle.manifest_text import MANIFEST_FILENAME
from medsa_deploy.bundle.recovery import tidy
from medsa_deploy.bundle.signature import sign_files, signature_target
from medsa_deploy.bundle.trusted_keys import fingerprint, read_private_key
from medsa_deploy.errors import BundleError, UsageError


@dataclass(frozen=True, kw_only=True)
class Signing:
    """A signature that was written."""

    bundle: Path
    signature: Path
    signer: str
    """Fingerprint of the key: SHA-256 of its public half in PEM."""
    files: int
    """Files that the signature covers, `manifest.json` included."""


def sign_bundle(bundle: Path, key: Path) -> Signing:
    """Sign every file of a bundle, those that stages have added included.

    Every file is compared with its SHA-256 first. The signature is `NAME.medsa.sig` beside the
    bundle, in place of an earlier one of the same key, or `NAME.medsa.SIGNER.sig` if another key
    has the first name. UsageError for a key that cannot be used, BundleError for a bundle with
    missing, changed or unlisted files.
    """
    private_key = read_private_key(key)
    signer = fingerprint(private_key.public_key())
    tidy(bundle)
    with changing(bundle):
        manifest, digest = read_manifest(bundle)
        added = check_contents(manifest, bundle)
        check_files(manifest, bundle)
        files = {file.path: file.sha256 for file in manifest.files}
        files |= {path: sha256(bundle / path) for path in added}
        files[MANIFEST_FILENAME] = digest
        if sha256(bundle / MANIFEST_FILENAME) != digest:
            raise BundleError(f"{bundle} changed while it was signed: sign it again")
        target = signature_target(bundle, signer)
        try:
            write_text(target, sign_files(files, bundle.resolve().name, private_key, signer))
        except OSError as e:
            raise UsageError(f"{target} cannot be written ({e.strerror}): change its folder") from e
    return Signing(bundle=bundle, signature=target, signer=signer, files=len(files))
