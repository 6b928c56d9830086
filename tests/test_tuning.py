"""`medsa-deploy doctor --tune` and `--backend auto`: measured once, used only where asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call, contents

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import UsageError
from medsa_deploy.runtime import tuning
from medsa_deploy.runtime.tuning import Choice
from medsa_deploy.stages.doctor import tune as stage
from medsa_deploy.stages.doctor.tune import Candidate, fastest


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "medsa-deploy" / "tuning.json"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SECONDS", 0.0)
    monkeypatch.setattr(stage, "ROUNDS", 2)


@pytest.fixture
def choice(bundle: Path) -> Choice:
    """OpenVINO with one thread, for the bundle on this machine."""
    return Choice(
        encoder_sha256=load_manifest(bundle).file("encoder").sha256,
        bundle=bundle.name,
        machine=tuning.this_machine(),
        backend="openvino",
        threads=1,
        first_click_ms=12.5,
        measured="2026-01-31",
    )


@pytest.mark.usefixtures("brief")
def test_tuning_measures_and_stores(bundle: Path, config: Path) -> None:
    done = call("doctor", "--tune", bundle, "--json")
    assert done.code == 0, done.err
    document = done.json
    settings = [(c["backend"], c["threads"]) for c in document["candidates"]]
    assert settings[0] == ("onnxruntime", None), "what runs where nothing is asked for"
    assert len(set(settings)) == len(settings)
    assert {backend for backend, _ in settings} == {"onnxruntime", "openvino"}
    for candidate in document["candidates"]:
        assert len(candidate["samples_ms"]) == 2
        assert min(candidate["samples_ms"]) > 0
    assert document["stored_in"] == str(config)
    assert json.loads(config.read_text()) == [document["choice"]]
    assert (document["choice"]["backend"], document["choice"]["threads"]) in settings
    assert document["choice"]["encoder_sha256"] == load_manifest(bundle).file("encoder").sha256

    assert list(call("doctor", "--json").json["tuning"]) == [document["choice"]]
    words = call("doctor").out
    assert f"auto for medsa_2d.medsa is {document['choice']['backend']} with" in words
    again = call("doctor", "--tune", bundle)
    assert again.code == 0
    assert f"stored in {config}" in again.out
    assert len(json.loads(config.read_text())) == 1, "replaced"


def candidate(backend: str, milliseconds: float) -> Candidate:
    return Candidate(backend=backend, threads=2, first_click_ms=milliseconds, samples_ms=())


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ((100, 94, 96), "b"),
        ((100, 95, 96), "a"),
        ((100, 120), "a"),
        ((100,), "a"),
        ((9, 8, 7), "c"),
    ],
)
def test_the_default_stays_unless_another_is_clearly_faster(
    times: tuple[float, ...], chosen: str
) -> None:
    candidates = tuple(candidate(name, ms) for name, ms in zip("abc", times, strict=False))
    assert fastest(candidates).backend == chosen


def test_auto_uses_what_is_stored(bundle: Path, bundle_of, choice: Choice) -> None:
    tuning.store(replace(choice, encoder_sha256="0" * 64, threads=7))
    tuning.store(replace(choice, machine="another", backend="onnxruntime"))
    tuning.store(choice)
    assert len(tuning.choices()) == 3
    with load(bundle, backend="auto") as session:
        assert session.backend.name == "openvino"
        assert session.backend.facts()["threads"] == 1
    with load(bundle, backend="auto", threads=2) as session:
        assert session.backend.facts()["threads"] == 2, "what the caller says goes first"
    with load(bundle) as session:
        assert session.backend.name == "onnxruntime", "the default depends on no measurement"


def test_all_threads_may_be_stored(bundle: Path, choice: Choice) -> None:
    tuning.store(replace(choice, threads=None))
    assert tuning.stored(choice.encoder_sha256).threads is None
    with load(bundle, backend="auto") as session:
        assert session.backend.facts()["threads"] == "all"
    assert "is openvino with all thread(s)" in call("doctor").out


def test_auto_is_verified_with_its_own_encoder(bundle: Path, choice: Choice) -> None:
    tuning.store(choice)
    done = call("verify", bundle, "--backend", "auto", "--json")
    assert done.code == 0, done.err
    (parity,) = (entry for entry in done.json["parity"] if entry["precision"] == "fp32")
    assert parity["backend"] == "openvino"
    (named,) = call("verify", bundle, "--backend", "openvino", "--json").json["parity"][:1]
    assert parity["encoders"].keys() == named["encoders"].keys()


def test_auto_without_anything_stored(bundle: Path, choice: Choice, config: Path) -> None:
    tuning.store(replace(choice, machine="another"))
    done = call("verify", bundle, "--backend", "auto", "--json")
    assert done.code == 0
    assert done.json["parity"][0]["backend"] == "onnxruntime"
    assert "warning: nothing is stored for this bundle on this machine" in done.err


ODD = json.dumps(
    [
        {"encoder_sha256": "0", "bundle": "b", "machine": "m", "backend": "openvino"}
        | {"threads": "two", "first_click_ms": 1.0, "measured": "2026-01-01"}
    ]
)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '[{"frob": 1}]', ODD, '{"a": 1}', "[" * 100_000, '["x"]'], ids=repr
)
def test_a_damaged_file_is_ignored(
    bundle: Path, config: Path, choice: Choice, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(text)
    assert tuning.stored(choice.encoder_sha256) is None
    assert str(config) in caplog.text
    assert "is ignored" in caplog.text
    tuning.store(choice)
    assert tuning.stored(choice.encoder_sha256) == choice


@pytest.mark.parametrize(
    "odd",
    [
        {"backend": "foo"},
        {"backend": "auto"},
        {"threads": -3},
        {"threads": 10**30},
        {"threads": 1.5},
        {"later": 1},
    ],
    ids=str,
)
def test_an_odd_entry_spoils_no_other(
    bundle: Path, config: Path, choice: Choice, odd: dict[str, object], caplog
) -> None:
    tuning.store(choice)
    (good,) = json.loads(config.read_text())
    entries = [good | odd, good | {"machine": "another"}]
    config.write_text(json.dumps(entries))
    assert len(tuning.choices()) == 1
    assert f"{config}: an entry is ignored: entry 0" in caplog.text
    with load(bundle, backend="auto") as session:
        assert session.backend.name == "onnxruntime"
    tuning.store(replace(choice, machine="a third"))
    assert json.loads(config.read_text())[:2] == entries
    tuning.store(choice)
    assert tuning.stored(choice.encoder_sha256) == choice


def test_a_folder_that_cannot_be_written(config: Path, choice: Choice) -> None:
    config.parent.parent.write_text("a file in its place")
    with pytest.raises(UsageError, match=r"tuning\.json cannot be written .*XDG_CONFIG_HOME"):
        tuning.store(choice)


def test_an_interrupted_tuning_stores_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.tune(bundle)
    assert contents(tmp_path) == {}


def test_the_folder_without_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.path() == tmp_path / ".config" / "medsa-deploy" / "tuning.json"


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    done = call("doctor", "--tune", tmp_path / "missing.medsa")
    assert done.code == 2
    assert "does not exist" in done.error
