"""Work in a child process: results, notes, errors of every kind, and an end with its parent."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import child_jobs
import pytest

from medsa_deploy import child, errors
from medsa_deploy.child import ChildError, run_in_child

PARENT = """
import sys
import child_jobs
from medsa_deploy.child import run_in_child
run_in_child(child_jobs.wait, sys.argv[1], on_note=lambda number: print(number, flush=True))
"""
"""A program with a child that goes on for good; it prints the child's number."""


@pytest.fixture(autouse=True)
def jobs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(child_jobs.__file__).parent))


def running(process: int) -> bool:
    """Whether a process is there, and not only waiting for its exit code to be read."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ends(process: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while running(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not running(process)


@pytest.mark.parametrize("job", [None, 3, "é\ud800", [1.5, math.inf], {"a": [True, {}]}])
def test_a_job_and_its_result_pass_as_json(job: object) -> None:
    answer = run_in_child(child_jobs.echo, job)
    assert answer["job"] == job
    assert answer["process"] != os.getpid()
    assert answer["session"] == answer["process"], "Ctrl-C of this terminal does not reach it"


def test_notes_come_in_order_before_the_result() -> None:
    numbers: list[int] = []
    assert run_in_child(child_jobs.count, 1000, on_note=numbers.append) == "counted"
    assert numbers == list(range(1000))


@pytest.mark.parametrize(
    "name",
    [
        *("UsageError", "BundleError", "EngineError", "EngineStaleError", "BuildError"),
        *("ParityError", "DeviceMemoryError", "DeviceLostError", "MedsaError"),
    ],
)
def test_errors_of_this_package_keep_class_and_message(name: str) -> None:
    kind = getattr(errors, name)
    with pytest.raises(kind) as caught:
        run_in_child(child_jobs.fail, (name, "line 1\nline 2"))
    assert type(caught.value) is kind
    assert str(caught.value) == "line 1\nline 2"


def test_an_error_with_a_constructor_of_its_own_survives() -> None:
    with pytest.raises(errors.MissingDependencyError) as caught:
        run_in_child(child_jobs.fail_without_extra, None)
    assert str(caught.value) == (
        "reading DICOM needs pydicom, which is not installed: pip install 'medsa-deploy[dicom]'"
    )


def test_an_error_that_is_not_in_the_tree_is_its_parent() -> None:
    with pytest.raises(errors.DeviceError, match="no such device") as caught:
        run_in_child(child_jobs.fail_locally, None)
    assert type(caught.value) is errors.DeviceError


def test_an_error_of_the_system_keeps_its_number_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run_in_child(child_jobs.read, str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")
    assert caught.value.strerror == "No such file or directory"


@pytest.mark.parametrize(
    ("job", "text"),
    [(child_jobs.fault, "KeyError: 'no such\\nkey'"), (child_jobs.unanswerable, "TypeError: ")],
)
def test_another_exception_shows_where_it_came_from(job: child.Job, text: str) -> None:
    with pytest.raises(ChildError) as caught:
        run_in_child(job, None)
    assert str(caught.value).startswith(text)
    assert caught.value.code is None
    (traceback,) = caught.value.__notes__
    assert traceback.startswith("Traceback")


def test_an_exit_without_a_result_is_an_error() -> None:
    for code in (7, 0):
        with pytest.raises(ChildError) as caught:
            run_in_child(child_jobs.leave, code)
        assert str(caught.value) == f"exit code {code}: a last word"
        assert (caught.value.code, caught.value.killed) == (code, False)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
def test_a_death_is_told_with_its_signal_and_last_words(number: int) -> None:
    with pytest.raises(ChildError) as caught:
        run_in_child(child_jobs.crash, number)
    assert str(caught.value) == f"signal {number:d}: last words"
    assert caught.value.code == -number
    assert caught.value.killed == (number == signal.SIGKILL)
    assert "first words\nlast words" in caught.value.__notes__[0]


def test_what_libraries_print_stands_between_no_messages(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_in_child(child_jobs.speak, None) == "said"
    assert capfd.readouterr() == ("", "")
    assert run_in_child(child_jobs.speak, None, show_stderr=True) == "said"
    out, err = capfd.readouterr()
    assert out == ""
    assert "a library speaks\n" in err
    assert "and again\n" in err


def test_temporary_files_of_a_child_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = Path(run_in_child(child_jobs.keep_a_file, None))
    assert path.is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_does_not_end_after_its_result_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "SECONDS_TO_END", 0.2)
    start = time.monotonic()
    number = run_in_child(child_jobs.linger, 300)
    assert time.monotonic() - start < 60
    assert not Path(f"/proc/{number}").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_ends_the_child(error: type[BaseException]) -> None:
    numbers: list[int] = []

    def interrupt(number: int) -> None:
        numbers.append(number)
        raise error

    with pytest.raises(error):
        run_in_child(child_jobs.wait, "", on_note=interrupt)
    assert not Path(f"/proc/{numbers[0]}").exists()


def test_a_child_runs_beside_the_thread_that_started_it() -> None:
    """The signal at the end of the parent's thread comes to no other thread's child."""
    answers: list[dict[str, object]] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(run_in_child(child_jobs.echo, i)))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["job"] for answer in answers) == [0, 1, 2]


@pytest.mark.parametrize("manner", ["", "deaf"])
@pytest.mark.parametrize("ignored", [(), (signal.SIGINT, signal.SIGHUP)], ids=["", "background"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(number: int, ignored: tuple[int, ...], manner: str) -> None:
    """`background`: as a shell's script starts a job, with SIGINT ignored.

    That parent goes on after SIGINT, and its child with it, until another signal ends both.
    """

    def set_signals() -> None:
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-c", PARENT, manner],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=set_signals,
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        assert running(process)
        parent.send_signal(number)
        if number in ignored:
            time.sleep(0.3)
            assert parent.poll() is None
            assert running(process)
            parent.terminate()
        assert parent.wait(timeout=20) != 0
    assert ends(process)


@pytest.mark.parametrize("version", [(3, 10), sys.version_info], ids=["3.10", "this one"])
def test_a_childs_search_path_leaves_out_the_working_and_the_scripts_folder(
    version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Python 3.10, too, which has no option for it."""
    (tmp_path / "json.py").write_text("raise SystemExit('not the library')")
    (tmp_path / "script.py").write_text("import json, sys; print(sys.argv[1], json.dumps(1))")
    monkeypatch.setattr(sys, "version_info", version)
    (script, module) = (child.python_command(p) for p in (tmp_path / "script.py", "json.tool"))
    done = subprocess.run([*script, "a"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a 1\n"
    done = subprocess.run(
        [*module, "--compact"],
        input="[1, 2]",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[1,2]\n"
