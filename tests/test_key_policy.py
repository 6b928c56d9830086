"""Configured keys: commands that change or measure a bundle obey them; the page's commands work."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import call, contents, copied, start
from test_sign import key_pair, public

from medsa_deploy.stages import sign_bundle
from medsa_deploy.stages.quantize import quantize

PAGE = Path(__file__).parents[1] / "docs" / "security.md"


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    return key_pair(tmp_path, "vendor")


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "BUNDLE", "--fp16"),
        ("build-engine", "BUNDLE", "--fp16", "--flavor", "rtx"),
        ("build-kernels", "BUNDLE"),
        ("doctor", "--tune", "BUNDLE"),
        ("profile", "BUNDLE", "--runs", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_refuses_a_bundle_that_no_key_has_signed(
    bundle: Path,
    tmp_path: Path,
    vendor: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    copy = copied(bundle, tmp_path)
    monkeypatch.setenv("MEDSA_TRUSTED_KEYS", str(public(vendor)))
    before = contents(copy)
    done = call(*(copy if word == "BUNDLE" else word for word in arguments), "--json")
    assert done.code == 2
    assert "has no signature beside it, and $MEDSA_TRUSTED_KEYS asks for one" in done.error
    assert contents(copy) == before


def test_a_changed_bundle_is_refused_until_it_is_signed_again(
    bundle: Path, tmp_path: Path, vendor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(bundle, tmp_path)
    sign_bundle(copy, vendor)
    (copy / "reports").mkdir()
    (copy / "reports" / "parity.html").write_text("<p>")
    monkeypatch.setenv("MEDSA_TRUSTED_KEYS", str(public(vendor)))
    for state in ("added", "changed"):
        done = call("quantize", copy, "--fp16")
        assert done.code == 2
        assert "'reports/parity.html'" in done.error
        sign_bundle(copy, vendor)
        if state == "added":
            (copy / "reports" / "parity.html").write_text("<p>other")
    # the signature is in order now: the command goes on to its work
    monkeypatch.setattr(quantize, "load_manifest", lambda bundle: 1 / 0)
    assert "ZeroDivisionError" in call("quantize", copy, "--fp16").error


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_pages_openssl_commands_make_keys_that_sign(bundle: Path, tmp_path: Path) -> None:
    commands = [line for line in PAGE.read_text().splitlines() if line.startswith("openssl ")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    copy = copied(bundle, tmp_path)
    done = call("sign", copy, "--key", tmp_path / "key.pem")
    assert done.code == 0, done.err
    assert call("verify", copy, "--trusted", tmp_path / "key.pub").code == 0
    openssl = "openssl ec -in key.pem -aes256 -passout pass:secret -out locked.pem"
    subprocess.run(shlex.split(openssl), cwd=tmp_path, check=True, capture_output=True)
    environment = {"PATH": "/usr/bin", "MEDSA_KEY_PASSWORD": "secret"}
    locked = start("sign", copy, "--key", tmp_path / "locked.pem", env=environment)
    assert locked.code == 0, locked.err
    assert (
        "set or unset $MEDSA_KEY_PASSWORD"
        in call("sign", copy, "--key", tmp_path / "locked.pem").error
    )
