"""Who may ask, and what is refused: tokens, hosts, sizes, too much work, bodies of noise."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from command_line import command, start
from malformed import send_malformed
from nninteractive_client import connected

from medsa_deploy.errors import UsageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.images.limits import VARIABLE
from medsa_deploy.machine import resident_bytes
from medsa_deploy.serve import bodies
from medsa_deploy.serve.access import check_exposure
from medsa_deploy.serve.array_wire import pack, unpack
from medsa_deploy.serve.cache import ByteCache, NetworkCache
from medsa_deploy.serve.refusals import BusyError
from medsa_deploy.serve.server import Server
from medsa_deploy.serve.service import ServeOptions
from medsa_deploy.serve.work import Job, WorkPool

REFUSALS = {400, 404, 405, 408, 410, 413, 415, 422, 501}
ENOUGH = 2**30


@pytest.fixture(scope="module")
def server(serving, bundle: Path) -> Server:
    return serving(bundle, upload_bytes=100_000)


def assert_nothing_fails(server: Server, count: int, seed: int) -> None:
    """Malformed requests are refused, and leave no worker behind; the server answers clicks."""
    seen = send_malformed(server, count, seed)
    assert set(seen) <= REFUSALS | {200}, seen
    assert seen[200] < count / 2
    assert '"event": "fault"' not in server.log.getvalue()  # type: ignore[attr-defined]
    pool, limit = server.service.pool, time.monotonic() + 60
    while pool.running or pool.waiting:
        assert time.monotonic() < limit
        time.sleep(0.01)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        lease = {"X-Lease-Token": client.post("/claim").json()["lease_token"]}
        array = np.zeros((1, 2, 40, 48), np.int16)
        array[:, :, 8:30] = 400
        assert client.post("/set_image", content=pack(array), headers=lease).status_code == 200
        click = {"coordinates": [0, 20, 20], "include_interaction": True}
        answer = client.post("/add_point_interaction", json=click, headers=lease)
        assert json.loads(answer.headers["x-meta"])["ran_prediction"]


def test_malformed_requests_are_refused(server: Server) -> None:
    assert_nothing_fails(server, 400, 3)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(server: Server) -> None:
    assert_nothing_fails(server, 10_000, 11)


def zeros(size: int) -> Iterator[bytes]:
    """A body of so many zeros, without its length."""
    for place in range(0, size, 2**20):
        yield bytes(min(2**20, size - place))


def test_a_body_without_length_is_cut_off(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        lease = {"X-Lease-Token": client.post("/api/lease").json()["lease"]}
        answer = client.put("/api/files/a.png", content=zeros(3 * 10**6), headers=lease)
        assert answer.status_code == 413
        folder = server.service.leases.find(lease["X-Lease-Token"]).folder
        assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_gigabyte_is_streamed(serving, bundle: Path) -> None:
    """It lies on disk, not in memory; a byte more is refused."""
    server = serving(bundle)
    with httpx.Client(base_url=server.url, timeout=300) as client:
        lease = {"X-Lease-Token": client.post("/api/lease").json()["lease"]}
        before = resident_bytes() or 0
        answer = client.put("/api/files/a.nii", content=zeros(ENOUGH), headers=lease)
        assert answer.json() == {"bytes": ENOUGH}
        assert (resident_bytes() or 0) - before < 200 * 2**20
        assert client.put("/api/files/b.nii", content=b"x", headers=lease).status_code == 413
        assert client.post("/api/image", json={}, headers=lease).status_code == 422
        client.delete("/api/files", headers=lease)
        answer = client.put("/api/files/a.nii", content=zeros(ENOUGH + 1), headers=lease)
        assert answer.status_code == 413
        for path in ("/set_image", "/api/masks"):
            claim = {"X-Lease-Token": client.post("/claim").json()["lease_token"]}
            answer = client.post(path, content=zeros(ENOUGH + 1), headers=claim)
            assert answer.status_code in (410, 413)


@pytest.mark.parametrize("pieces", [1, 50], ids=["that stops", "that drips"])
def test_a_slow_body_times_out(server: Server, monkeypatch, pieces: int) -> None:
    monkeypatch.setattr(bodies, "FIRST_SECONDS", 0.3)
    with httpx.Client(base_url=server.url) as client:
        token = client.post("/api/lease").json()["lease"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"PUT /api/files/a.png HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Lease-Token: {token}\r\n"
        connection.sendall(f"{head}Content-Length: 90000\r\n\r\n".encode())
        for _ in range(pieces):
            connection.sendall(b"xxxx")
            if select.select([connection], [], [], 0.02)[0]:
                break
        assert b" 408 " in connection.recv(4096)
    assert server.service.leases.find(token).files == 1
    assert not list(server.service.leases.find(token).folder.rglob("*.png"))


def test_large_bodies_and_unknown_leases(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        lease = {"X-Lease-Token": client.post("/api/lease").json()["lease"]}
        answer = client.put("/api/files/a.png", content=b"x" * 100_001, headers=lease)
        assert answer.status_code == 413
        assert client.post("/api/masks", content=b"{}").status_code == 410
        names = {"path": "../../etc/passwd"}
        assert client.post("/api/image", json=names, headers=lease).status_code == 404


def test_an_image_beyond_the_memory_is_refused(
    server: Server, volume_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve --max-memory` sets the variable."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        lease = {"X-Lease-Token": client.post("/api/lease").json()["lease"]}
        client.put("/api/files/a.nii.gz", content=volume_file.read_bytes(), headers=lease)
        monkeypatch.setenv(VARIABLE, "20kB")
        answer = client.post("/api/image", json={}, headers=lease)
        assert answer.status_code == 422
        assert "announces 48×40 pixels" in answer.text
        assert "--max-memory" in answer.text
        monkeypatch.setenv(VARIABLE, "20MB")
        assert client.post("/api/image", json={}, headers=lease).status_code == 200


def test_tokens_hosts_and_origins(serving, bundle: Path, server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token.txt"
    token.write_text("0123456789abcdef0123\n")
    with httpx.Client(base_url=serving(bundle, token=token).url) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer no"}).status_code == 401
        allowed = {"Authorization": "Bearer 0123456789abcdef0123"}
        assert "medsa_serve_leases 0" in client.get("/metrics", headers=allowed).text
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/api/bundles", headers={"Host": "evil.org"}).status_code == 403
        assert client.post("/claim", headers={"Origin": "http://evil.org"}).status_code == 403
        policy = client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert set(client.get("/api/openapi.json").json()["paths"]) >= {"/api/masks", "/api/image"}
    with pytest.raises(UsageError, match="can be reached from other machines"):
        check_exposure("0.0.0.0", token=token, certificate=None, key=None)


def test_too_much_work_is_refused_and_work_is_cancelled() -> None:
    begun, jobs = threading.Event(), []

    def until_cancelled(job: Job) -> None:
        begun.set()
        while True:
            job.check()

    with WorkPool(threads=1, most_waiting=1) as pool:
        jobs.append(pool.submit(until_cancelled))
        assert begun.wait(10)
        jobs.append(pool.submit(until_cancelled))
        with pytest.raises(BusyError) as refusal:
            pool.submit(until_cancelled)
        assert refusal.value.retry_after is not None
        jobs[0].cancel()
    for job in jobs:
        assert isinstance(job.future.exception(10), Exception)


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = ByteCache(100)
    for number in (1, 2, 1, 3):
        cache.value(("image", number), lambda: "value", size=lambda value: 50)
    assert (len(cache), cache.bytes, cache.hits, cache.misses) == (2, 100, 1, 3)
    cache.value(("image", 1), lambda: pytest.fail("was dropped"), size=lambda value: 50)
    cache.forget("image")
    assert (len(cache), cache.bytes) == (0, 0)


def test_logits_of_many_clicks_leave_embeddings_in_the_cache(serving, bundle: Path, array) -> None:
    server = serving(bundle, cache_bytes=2**21)
    cache: NetworkCache = server.service.cache
    with connected(server, array) as client:
        for column in range(12, 36):
            client.add_point_interaction((5, 15, column), True)
        assert (cache.embeddings.misses, cache.logits.misses) == (1, 24)
        assert len(cache.embeddings) == 1
        assert 1 < len(cache.logits) < 24
        assert cache.logits.bytes <= cache.logits.most_bytes == 2**18
        assert client.undo()  # to prompts whose logits are known
        assert cache.logits.misses == 24


def test_arrays_come_back(array: np.ndarray) -> None:
    for values in (array[None], array.astype(np.float32), np.zeros((3, 5), bool)):
        np.testing.assert_array_equal(unpack(pack(values), most_bytes=10**7), values)


def test_the_command_ends_on_sigterm(bundle: Path) -> None:
    words = command("serve", bundle, "--port", "0")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        assert httpx.get(f"{url}/healthz").status_code == 200
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=30)
    assert run.returncode == 0
    assert '"event": "stopped"' in err
    assert "--token" in start("serve", bundle, "--host", "0.0.0.0").error
    with pytest.raises(UsageError, match="no bundle"), Server(ServeOptions(bundles=()), EventLog):  # type: ignore[arg-type]
        pass
