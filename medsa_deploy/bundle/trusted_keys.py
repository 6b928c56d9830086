"""PEM files → the keys whose signatures a device trusts; a PEM file → the key that signs.

Trusted keys are configured in three places. The policy file, which only root may write, always
applies. The caller's keys apply too, or else those that $MEDSA_TRUSTED_KEYS names.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsa_deploy.errors import MissingDependencyError, UsageError, one_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

VARIABLE = "MEDSA_TRUSTED_KEYS"
"""Environment variable: files and folders of public keys, as PATH separates them."""
PASSWORD_VARIABLE = "MEDSA_KEY_PASSWORD"
POLICY = Path("/etc/medsa-deploy/trusted-keys.pem")
"""Public keys that every bundle on this machine must be signed by; only root may change it."""
KEY_SUFFIXES = (".pem", ".pub")
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curves of keys → the hash of their signatures."""
MOST_BYTES = 1 << 20
_PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

KeyPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrustedKey:
    """A public key and where it was read."""

    path: Path
    fingerprint: str
    """See `fingerprint`."""
    public_key: EllipticCurvePublicKey


@dataclass(frozen=True, kw_only=True)
class KeySet:
    """Keys of one place; a bundle must be signed by one of them."""

    place: str
    """In words: `the policy /etc/…`."""
    keys: tuple[TrustedKey, ...]


def configured_keys(trusted: KeyPaths | None) -> list[KeySet]:
    """The sets of keys that apply; a bundle must be signed by a key of each. Empty: none do.

    `trusted`: files and folders of public keys, of the caller. UsageError for a place that is
    configured and holds no usable key, and for a policy file that others than root may change:
    a mistake here must never turn the check off.
    """
    sets = []
    if os.path.lexists(POLICY):
        _check_policy(POLICY)
        sets.append(KeySet(place=f"the policy {POLICY}", keys=_read_all([POLICY])))
    if trusted is not None:
        paths = [trusted] if isinstance(trusted, str | os.PathLike) else list(trusted)
        place = ", ".join(os.fspath(path) for path in paths)
        sets.append(KeySet(place=place, keys=_read_all(map(Path, paths))))
    elif VARIABLE in os.environ:
        named = [Path(name) for name in os.environ[VARIABLE].split(os.pathsep) if name]
        if not named:
            raise UsageError(f"${VARIABLE} names no key: unset it, or name files of public keys")
        sets.append(KeySet(place=f"${VARIABLE}", keys=_read_all(named)))
    return sets


def _check_policy(path: Path) -> None:
    """UsageError unless file and folder are root's, and only root may change them."""
    for place in (path, path.parent):
        about = place.stat()
        if about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{place} may be changed by others than root, so it is no policy: "
                f"chown root {place} && chmod go-w {place}"
            )


def _read_all(paths: Iterable[Path]) -> tuple[TrustedKey, ...]:
    """The keys of files and folders; UsageError if a path holds none."""
    keys: list[TrustedKey] = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.suffix in KEY_SUFFIXES]
        read = [key for file in files for key in _read_keys(file)]
        if not read:
            raise UsageError(
                f"{path} holds no public key ({', '.join(KEY_SUFFIXES)}): name the signer's "
                "public key, a PEM file that begins with -----BEGIN PUBLIC KEY-----"
            )
        keys += read
    return tuple(keys)


def _read_keys(path: Path) -> list[TrustedKey]:
    """Every public key in a PEM file."""
    keys = []
    content, serialization = _content(path), _serialization()
    for pem in _PUBLIC_KEY.findall(content):
        try:
            public_key = serialization.load_pem_public_key(pem)
        except Exception as e:  # cryptography raises classes of its own beside ValueError
            raise UsageError(f"{path} holds a public key that cannot be read: {one_line(e)}") from e
        _check_curve(public_key, path)
        keys.append(
            TrustedKey(path=path, fingerprint=fingerprint(public_key), public_key=public_key)
        )
    return keys


def read_private_key(path: Path) -> EllipticCurvePrivateKey:
    """The key that signs. Its password, if it has one, is in $MEDSA_KEY_PASSWORD.

    UsageError for a file that is no private key on P-256, P-384 or P-521.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    content, serialization = _content(path), _serialization()
    try:
        key = serialization.load_pem_private_key(
            content, None if password is None else password.encode()
        )
    except TypeError as e:  # encrypted without a password, or the reverse
        raise UsageError(f"{path}: {one_line(e)}: set or unset ${PASSWORD_VARIABLE}") from e
    except Exception as e:  # cryptography raises classes of its own beside ValueError
        raise UsageError(
            f"{path} is no private key in PEM ({one_line(e)}): make one with openssl ecparam "
            "-genkey -name prime256v1 -noout -out key.pem"
        ) from e
    _check_curve(key, path)
    private_key: EllipticCurvePrivateKey = key
    return private_key


def fingerprint(public_key: EllipticCurvePublicKey) -> str:
    """The name of a key: the SHA-256 of its PEM text, in hexadecimal."""
    serialization = _serialization()
    pem = public_key.public_bytes(
        encoding=serialization.Encoding.PEM,
        format=serialization.PublicFormat.SubjectPublicKeyInfo,
    )
    return hashlib.sha256(pem).hexdigest()


def hash_of(public_key: EllipticCurvePublicKey) -> HashAlgorithm:
    """The hash of a key's signatures."""
    from cryptography.hazmat.primitives import hashes

    algorithm: HashAlgorithm = getattr(hashes, CURVES[public_key.curve.name])()
    return algorithm


def _check_curve(key: Any, path: Path) -> None:
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__)
    if curve not in CURVES:
        raise UsageError(
            f"{path} holds a key of {curve}, expected one on the curve P-256, P-384 or P-521: make "
            "one with openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
        )


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MOST_BYTES)
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}): name a key in PEM") from e


def _serialization() -> Any:
    """cryptography's module of key formats."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as e:  # another ImportError may be for want of memory
        raise MissingDependencyError(
            "cryptography", extra="sign", purpose="checking signatures"
        ) from e
    return serialization
