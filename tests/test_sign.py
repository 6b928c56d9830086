"""Signatures: OpenSSF's own tool takes ours, ours takes its; a changed bundle is refused."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from command_line import call, copied, start
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from medsa_deploy import load
from medsa_deploy.bundle import opened, trusted_keys
from medsa_deploy.bundle.manifest import load_manifest, save_manifest
from medsa_deploy.bundle.opened import held_files
from medsa_deploy.errors import BundleError, SignatureError, UsageError
from medsa_deploy.stages import sign_bundle

CURVES = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}


def key_pair(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> Path:
    """`NAME.key`, beside it `NAME.pub`; the private key's path."""
    private = ec.generate_private_key(curve or CURVES["p256"])
    write_pair(folder / name, private)
    return folder / f"{name}.key"


def write_pair(path: Path, private) -> None:
    path.with_suffix(".key").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.with_suffix(".pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """OpenSSF's model-signing."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    return key_pair(tmp_path, "vendor")


@pytest.fixture
def signed(bundle: Path, tmp_path: Path, vendor: Path) -> Path:
    """A copy of the bundle, signed by the vendor."""
    copy = copied(bundle, tmp_path)
    sign_bundle(copy, vendor)
    return copy


def public(key: Path) -> Path:
    return key.with_suffix(".pub")


@pytest.mark.parametrize("curve", CURVES)
def test_openssfs_tool_verifies_ours(bundle: Path, tmp_path: Path, curve: str) -> None:
    copy, key = copied(bundle, tmp_path), key_pair(tmp_path, "k", CURVES[curve])
    done = call("sign", copy, "--key", key, "--json")
    assert done.code == 0, done.err
    assert done.json["signature"] == f"{copy}.sig"
    assert done.json["files"] == len(load_manifest(copy).files) + 1
    arguments = ("verify", "key", copy, "--signature", f"{copy}.sig", "--public_key", public(key))
    verified = tool(*arguments)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    if curve == "p256":
        with (copy / "decoder.onnx").open("ab") as f:
            f.write(b"x")
        assert tool(*arguments).returncode != 0


def test_ours_verifies_the_tools(bundle: Path, tmp_path: Path, vendor: Path) -> None:
    copy = copied(bundle, tmp_path)
    arguments = ("--private_key", vendor, "--signature", f"{copy}.sig")
    signed = tool("sign", "key", copy, *arguments)
    assert signed.returncode == 0, signed.stdout + signed.stderr
    with load(copy, trusted=public(vendor), threads=1) as session:
        assert session.image_size == 256
    with pytest.raises(SignatureError, match=r"no key of .*other\.pub has signed it"):
        load(copy, trusted=public(key_pair(tmp_path, "other")))


def test_run_and_verify_take_trusted_keys(signed: Path, tmp_path: Path, vendor: Path) -> None:
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)).save(
        tmp_path / "a.png"
    )
    run = ("run", signed, tmp_path / "a.png", "--point", "30,30", "-o", tmp_path / "m.png")
    assert call(*run, "--trusted", public(vendor)).code == 0
    done = call("verify", signed, "--trusted", public(vendor), "--json")
    assert done.code == 0, done.err
    assert len(done.json["signers"]) == 1
    other = public(key_pair(tmp_path, "other"))
    (tmp_path / "m.png").unlink()
    for command in (run, ("verify", signed)):
        done = call(*command, "--trusted", other)
        assert done.code == 2
        assert "has signed it" in done.error
    assert not (tmp_path / "m.png").exists()


def test_another_manifest_is_refused(signed: Path, vendor: Path) -> None:
    """A changed threshold with a right digest, which loads without keys."""
    import dataclasses

    manifest = load_manifest(signed)
    conventions = dataclasses.replace(manifest.conventions, threshold=0.9)
    save_manifest(dataclasses.replace(manifest, conventions=conventions), signed)
    load(signed, threads=1).close()
    with pytest.raises(SignatureError, match=r"'manifest\.json' is not the file that was signed"):
        load(signed, trusted=public(vendor))


def test_a_bundle_without_a_signature_is_refused(bundle: Path, vendor: Path) -> None:
    with pytest.raises(SignatureError, match=r"has no signature beside it, and .* asks for one"):
        load(bundle, trusted=public(vendor))


def test_an_added_page_is_signed_or_refused(signed: Path, vendor: Path) -> None:
    (signed / "reports").mkdir()
    (signed / "reports" / "parity.html").write_text("<p>")
    with pytest.raises(SignatureError, match=r"'reports/parity\.html' was added and is covered by"):
        load(signed, trusted=public(vendor))
    sign_bundle(signed, vendor)
    load(signed, trusted=public(vendor), threads=1).close()
    (signed / "reports" / "parity.html").write_text("<p>other")
    done = call("verify", signed, "--trusted", public(vendor))
    assert "'reports/parity.html' is not the file that was signed" in done.error


def test_a_second_signer_gets_a_file_of_its_own(signed: Path, tmp_path: Path, vendor: Path) -> None:
    hospital = key_pair(tmp_path, "hospital")
    second = sign_bundle(signed, hospital)
    assert second.signature.name == f"{signed.name}.{second.signer[:16]}.sig"
    assert sign_bundle(signed, hospital).signature == second.signature
    for key in (vendor, hospital):
        load(signed, trusted=[public(key)], threads=1).close()


def test_keys_of_the_environment_and_the_policy_apply(
    signed: Path, tmp_path: Path, vendor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = public(key_pair(tmp_path, "other"))
    monkeypatch.setenv("MEDSA_TRUSTED_KEYS", str(other))
    with pytest.raises(SignatureError, match="MEDSA_TRUSTED_KEYS has signed it"):
        load(signed)
    load(signed, trusted=public(vendor), threads=1).close()  # the caller's go first
    for value in ("", str(tmp_path / "nothing")):
        monkeypatch.setenv("MEDSA_TRUSTED_KEYS", value)
        with pytest.raises(UsageError, match=r"names no key|cannot be read"):
            load(signed)
    monkeypatch.delenv("MEDSA_TRUSTED_KEYS")
    monkeypatch.setattr(trusted_keys, "POLICY", other)
    monkeypatch.setattr(trusted_keys, "_check_policy", lambda path: None)
    with pytest.raises(SignatureError, match="no key of the policy"):
        load(signed, trusted=public(vendor))  # and never turn the policy off


def test_a_policy_that_others_may_change_is_refused(
    signed: Path, vendor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusted_keys, "POLICY", public(vendor))
    public(vendor).chmod(0o666)
    with pytest.raises(UsageError, match="may be changed by others than root, so it is no policy"):
        load(signed)


def test_damaged_signatures_are_refused_in_words(signed: Path, vendor: Path) -> None:
    path = Path(f"{signed}.sig")
    content = path.read_bytes()
    for damaged in (b"", b"{}", b"\xff", content[:-9], b"[" * 100_000, b'{"a": 1, "a": 2}'):
        path.write_bytes(damaged)
        with pytest.raises(SignatureError, match="is not a signature in OpenSSF's model-signing"):
            load(signed, trusted=public(vendor))
    data = json.loads(content)
    envelope = data["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"]).replace(b"decoder", b"DECODER")
    envelope["payload"] = base64.b64encode(statement).decode()
    path.write_text(json.dumps(data))
    with pytest.raises(SignatureError, match="no key of"):
        load(signed, trusted=public(vendor))


def test_keys_that_cannot_sign_are_refused(bundle: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "ed", ed25519.Ed25519PrivateKey.generate())
    (tmp_path / "text.key").write_text("no key")
    for name, words in {"ed": "expected one on the curve", "text": "is no private key"}.items():
        with pytest.raises(UsageError, match=words):
            sign_bundle(bundle, tmp_path / f"{name}.key")


def test_without_cryptography_keys_are_never_passed_over(signed: Path, vendor: Path) -> None:
    done = start("verify", signed, "--trusted", public(vendor), without=("cryptography",))
    assert done.code == 2
    assert "pip install 'medsa-deploy[sign]'" in done.error


def test_an_unlisted_file_is_refused_and_a_leftover_is_not(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    (copy / ".new-abc.tmp").mkdir()
    load(copy, threads=1).close()
    (copy / "weights.bin").write_bytes(b"1")
    with pytest.raises(BundleError, match=r"its manifest does not list, 'weights\.bin'"):
        load(copy)


def test_a_file_exchanged_while_it_is_loaded_is_detected(tmp_path: Path) -> None:
    for change in ("replace", "write"):
        path = tmp_path / "encoder.onnx"
        path.write_bytes(b"right")
        with held_files(tmp_path) as files:
            files.add("encoder.onnx")
            files.check_digests()
            files.check_unchanged()
            if change == "replace":
                (tmp_path / "other").write_bytes(b"wrong")
                (tmp_path / "other").replace(path)
            else:
                path.write_bytes(b"wrong")
            with pytest.raises(BundleError, match="changed while it was loaded"):
                files.check_unchanged()


def test_a_recent_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times may not tell two writes apart."""
    monkeypatch.setattr(opened, "_identity", lambda about: (0, 0, about.st_size, 0, 2**62))
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"right")
    with held_files(tmp_path) as files:
        files.add("encoder.onnx")
        files.check_digests()
        path.write_bytes(b"wrong")
        with pytest.raises(BundleError, match="changed while it was loaded"):
            files.check_unchanged()


def test_a_load_detects_an_exchange(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is exchanged after its hash was compared, before the backend reads it."""
    from medsa_deploy.runtime import loading

    copy, hold = copied(bundle, tmp_path), loading._hold

    def exchange(*arguments) -> None:
        hold(*arguments)
        shutil.copy(bundle / "decoder.onnx", copy / "other")
        (copy / "other").replace(copy / "decoder.onnx")

    monkeypatch.setattr(loading, "_hold", exchange)
    with pytest.raises(BundleError, match=r"decoder\.onnx changed while it was loaded"):
        load(copy, threads=1)
