"""Paths and SHA-256 of a bundle's files ⇄ a detached signature, in OpenSSF's model-signing format.

The file is a Sigstore bundle (version 0.3) with a DSSE envelope around an in-toto statement that
lists every file. Signatures are ECDSA on P-256, P-384 or P-521. Specifications: DSSE 1.0.0,
in-toto Statement v1, model-signing v1.0.
"""

from __future__ import annotations

import base64
import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsa_deploy.errors import SignatureError, UsageError, one_line

from .manifest_text import document_of
from .trusted_keys import TrustedKey, hash_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MOST_BYTES = 64 << 20
SUFFIX = ".sig"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A signature as it was read: neither its signer nor its statement is checked yet."""

    path: Path
    payload: bytes
    """The statement, byte for byte as it was signed."""
    signature: bytes
    """ECDSA, in DER."""
    signer: str
    """The fingerprint that the file names; empty in files of old tools."""


def signature_paths(bundle: Path) -> list[Path]:
    """The signatures beside a bundle: `NAME.medsa.sig`, then `NAME.medsa.SIGNER.sig` by name."""
    bundle = bundle.resolve()
    first = bundle.with_name(bundle.name + SUFFIX)
    further_paths = sorted(
        path
        for path in bundle.parent.iterdir()
        if path.name.startswith(f"{bundle.name}.") and path.name.endswith(SUFFIX) and path != first
    )
    return [path for path in (first, *further_paths) if path.is_file()]


def sign_files(
    files: Mapping[str, str], name: str, private_key: EllipticCurvePrivateKey, signer: str
) -> str:
    """The text of a signature.

    `files`: path in the bundle → SHA-256. `name`: the bundle's. `signer`: see `fingerprint`.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = json.dumps(_statement(files, name), indent=2, ensure_ascii=False).encode()
    algorithm = ec.ECDSA(hash_of(private_key.public_key()))
    signature = private_key.sign(_pre_authentication(payload), algorithm)
    return json.dumps(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": signer}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def _statement(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """The in-toto statement. Its subject's digest is the SHA-256 of all digests, in order."""
    paths = sorted(files)
    together = hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in paths))
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": together.hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [
                {"name": path, "digest": files[path], "algorithm": "sha256"} for path in paths
            ],
        },
    }


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE's encoding of type and payload, which is what is signed."""
    return b"DSSEv1 %d %s %d %s" % (
        len(PAYLOAD_TYPE),
        PAYLOAD_TYPE.encode(),
        len(payload),
        payload,
    )


def read_signature(path: Path) -> Signature:
    """Read a signature's file; SignatureError if it is not one of this format."""
    try:
        with path.open("rb") as f:
            content = f.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        data = document_of(content.decode())
        envelope = data["dsseEnvelope"]
        (entry,) = envelope["signatures"]
        payload, signature = (_decoded(text) for text in (envelope["payload"], entry["sig"]))
        material = data["verificationMaterial"].get("publicKey") or {}
        types = (data["mediaType"], envelope["payloadType"])
        if types != (MEDIA_TYPE, PAYLOAD_TYPE):
            raise ValueError(f"its types are {reprlib.repr(types)}")
    except OSError as e:
        raise SignatureError(f"{path} cannot be read ({e.strerror}): copy it again") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SignatureError(
            f"{path} is not a signature in OpenSSF's model-signing format, made with a key "
            f"({one_line(e)}): copy it again, or sign the bundle again with medsa-deploy sign"
        ) from e
    signer = material.get("hint") if isinstance(material, dict) else None
    return Signature(
        path=path,
        payload=payload,
        signature=signature,
        signer=signer if isinstance(signer, str) else "",
    )


def signed_files(signature: Signature, key: TrustedKey) -> dict[str, str] | None:
    """Path → SHA-256 of the files that `key` has signed; None if the key did not sign this.

    SignatureError if the key did, but what it signed is not a list of files with SHA-256.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    if signature.signer not in ("", key.fingerprint):
        return None
    try:
        key.public_key.verify(
            signature.signature,
            _pre_authentication(signature.payload),
            ec.ECDSA(hash_of(key.public_key)),
        )
    except InvalidSignature:
        return None
    try:
        return _files_of(document_of(signature.payload.decode()))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SignatureError(
            f"{signature.path} is signed, but lists no files with their SHA-256 ({one_line(e)}): "
            "sign the bundle again with medsa-deploy sign"
        ) from e


def _files_of(statement: dict[str, Any]) -> dict[str, str]:
    """The files of a statement; ValueError unless they are whole files with SHA-256."""
    types = (statement["_type"], statement["predicateType"])
    if types != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError(f"its types are {reprlib.repr(types)}")
    predicate = statement["predicate"]
    if predicate["serialization"]["method"] != "files":
        raise ValueError("files are signed in shards")
    files: dict[str, str] = {}
    for resource in predicate["resources"]:
        path, digest = resource["name"], resource["digest"]
        if resource["algorithm"] != "sha256" or not isinstance(path, str) or path in files:
            raise ValueError(f"the entry {reprlib.repr(resource)}")
        files[path] = bytes.fromhex(digest).hex()
    (subject,) = statement["subject"]
    digests = b"".join(bytes.fromhex(digest) for digest in files.values())
    if hashlib.sha256(digests).hexdigest() != subject["digest"]["sha256"]:
        raise ValueError("its subject is not its files")
    return files


def _decoded(text: Any) -> bytes:
    """Base64 → bytes; ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError("a field is no text")
    return base64.b64decode(text, validate=True)


def signature_target(bundle: Path, signer: str) -> Path:
    """Where a signer's signature goes: in place of its earlier one, else under the first free name.

    UsageError if files that are no signatures have the names.
    """
    resolved = bundle.resolve()
    first = resolved.with_name(resolved.name + SUFFIX)
    second = resolved.with_name(f"{resolved.name}.{signer[:16]}{SUFFIX}")
    for path in (first, second):
        if not path.exists():
            return path
        try:
            earlier = read_signature(path)
        except SignatureError as e:
            raise UsageError(f"{e}; or delete it") from e
        if earlier.signer == signer:
            return path
    raise UsageError(f"{first} and {second} are signatures of other keys: delete one of them")
