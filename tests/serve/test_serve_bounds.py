"""Who may ask, and what is refused: tokens, hosts, sizes, too much work, bodies of noise."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from command_line import command, start

from medsa_deploy.errors import UsageError
from medsa_deploy.event_log import EventLog
from medsa_deploy.serve.access import check_exposure
from medsa_deploy.serve.array_wire import pack, unpack
from medsa_deploy.serve.cache import ByteCache
from medsa_deploy.serve.refusals import BusyError
from medsa_deploy.serve.server import Server
from medsa_deploy.serve.service import ServeOptions
from medsa_deploy.serve.work import Job, WorkPool

PATHS = (
    *("/api/image", "/api/masks", "/api/export", "/set_image", "/predict", "/infer/a"),
    *("/add_point_interaction", "/add_bbox_interaction", "/set_target_buffer"),
)


@pytest.fixture(scope="module")
def server(serving, bundle: Path) -> Server:
    return serving(bundle, upload_bytes=100_000)


def test_bodies_of_noise_are_refused(server: Server, array: np.ndarray) -> None:
    """None is answered with 500, and the server works on."""
    rng = random.Random(3)
    good = pack(array[None])
    with httpx.Client(base_url=server.url) as client:
        lease = {"X-Lease-Token": client.post("/claim").json()["lease_token"]}
        seen = set()
        for _ in range(400):
            body = bytearray(rng.choice((good, b'{"coordinates": [1, 2, 3], "near": -1}', b"[[[")))
            for _ in range(rng.randrange(6)):
                body[rng.randrange(min(60, len(body)))] = rng.randrange(256)
            path = rng.choice(PATHS)
            seen.add(client.post(path, content=bytes(body), headers=lease).status_code)
        assert seen <= {200, 400, 404, 410, 413, 415, 422, 501}, seen
        assert client.get("/healthz").json()["status"] == "ok"
        assert '"event": "fault"' not in server.log.getvalue()  # type: ignore[attr-defined]


def test_large_bodies_and_unknown_leases(server: Server) -> None:
    with httpx.Client(base_url=server.url) as client:
        lease = {"X-Lease-Token": client.post("/api/lease").json()["lease"]}
        answer = client.put("/api/files/a.png", content=b"x" * 100_001, headers=lease)
        assert answer.status_code == 413
        assert client.post("/api/masks", content=b"{}").status_code == 410
        names = {"path": "../../etc/passwd"}
        assert client.post("/api/image", json=names, headers=lease).status_code == 404


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
