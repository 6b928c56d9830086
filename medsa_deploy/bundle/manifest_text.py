"""The text of `manifest.json` ⇄ a JSON object, with a digest that covers every byte of the text.

The digest finds accidents: a flipped bit, a truncated copy, an edit by hand. Whoever can write the
file can also write its digest; `bundle/signature.py` is for changes on purpose.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from medsa_deploy.errors import BundleError, one_line

MANIFEST_FILENAME = "manifest.json"
DIGEST = "digest"
"""The last field of the text: SHA-256 of the text with zeros in place of the digest itself."""
_ZEROS = "0" * 64


def document_to_text(data: dict[str, Any]) -> str:
    """A JSON object as text, with its digest as the last field.

    >>> print(document_to_text({"schema": 2}))
    {
      "schema": 2,
      "digest": "203b16cbba313de09ae5430132f0508122dccfa428819d114e345a267cbfd48e"
    }
    <BLANKLINE>
    """
    zeroed = {**data, DIGEST: _ZEROS}
    text = json.dumps(zeroed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _replace_digest(text, _ZEROS, _sha256(text))


def document_from_text(text: str) -> dict[str, Any]:
    """The object in a text, without its digest. Texts of earlier versions have no digest.

    BundleError unless the text is one JSON object without a repeated key, NaN or Infinity.
    """
    try:
        data = document_of(text)
    except (ValueError, RecursionError) as e:
        raise BundleError(
            f"{MANIFEST_FILENAME} is not JSON ({one_line(e)}): copy the bundle again or export it "
            "again"
        ) from e
    if not isinstance(data, dict) or "schema" not in data:
        raise BundleError(
            f"{MANIFEST_FILENAME} has no schema version: it is not a bundle's manifest; name a "
            "folder that medsa-deploy export has written"
        )
    return data


def document_of(text: str) -> Any:
    """The value of a JSON text; ValueError for a repeated key, NaN and Infinity.

    >>> document_of('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' is there twice
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repetition)


def check_digest(data: dict[str, Any], text: str) -> None:
    """Take the digest out of `data`; BundleError if it is not the text's."""
    if DIGEST not in data:
        return
    digest = data.pop(DIGEST)
    if not isinstance(digest, str) or digest != _sha256(_replace_digest(text, digest, _ZEROS)):
        raise BundleError(
            f"{MANIFEST_FILENAME} is not as it was written: its digest differs; copy the bundle "
            "again or export it again"
        )


def _replace_digest(text: str, digest: str, other: str) -> str:
    """The text with the value of its last field exchanged."""
    start, field, end = text.rpartition(f'"{DIGEST}": "{digest}"')
    return f'{start}"{DIGEST}": "{other}"{end}' if field else text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity: Python's parser accepts them, JSON does not."""
    raise ValueError(f"{name} is not a number")


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields; ValueError if a key is there twice, because readers differ on which."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated[:40]!r} is there twice")
    return data
