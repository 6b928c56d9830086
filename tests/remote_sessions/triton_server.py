"""NVIDIA's tritonserver, from the package nvidia-pytriton: an environment for it, and processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nvidia-pytriton==0.7.0"
RUNTIME = ("numpy<2", "onnxruntime==1.32.0", "pillow", "nibabel")
"""What the models need; its python backend reads the arrays of NumPy 1 only."""
START_SECONDS, STOP_SECONDS = 180.0, 90.0


def make_environment(folder: Path) -> Path:
    """A virtual environment with the server and this repository's package; its site-packages."""
    python = shutil.which("python3.11", path="/usr/bin")
    if python is None:
        pytest.skip("Triton's python backend needs the system's Python 3.11 (/usr/bin/python3.11)")
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    subprocess.run([*pip, *RUNTIME], check=True)
    subprocess.run([*pip, "--no-deps", PACKAGE], check=True)
    packages = folder / "lib/python3.11/site-packages"
    for source in (*(ROOT / "medsa_deploy").iterdir(), ROOT / "kernels"):
        target = packages / "medsa_deploy" / source.name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(source)
    files = packages / "pytriton/tritonserver"
    backend = folder / "backends/python"
    shutil.copytree(files / "backends/python", backend)
    shutil.copy(files / "python_backend_stubs/3.11/triton_python_backend_stub", backend)
    return packages


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


class TritonServer:
    """A server process; a context manager that ends it. It may be stopped and started again."""

    def __init__(self, packages: Path, repository: Path, log: Path) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._packages, self._repository, self._log = packages, repository, log
        self._process: subprocess.Popen[bytes] | None = None
        self._region = f"medsa_{os.getpid()}_{self.http_port}_"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process, without waiting until it serves."""
        environment = {
            "LD_LIBRARY_PATH": str(self._packages / "nvidia_pytriton.libs"),
            "MEDSA_SITE_PACKAGES": str(self._packages),
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
        }
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._packages / "pytriton/tritonserver/bin/tritonserver",
                    f"--model-repository={self._repository}",
                    f"--backend-directory={self._packages.parents[2] / 'backends'}",
                    f"--backend-config=python,shm-region-prefix-name={self._region}",
                    *(f"--{name}-address=127.0.0.1" for name in ports),
                    *(f"--{name}-port={port}" for name, port in ports.items()),
                ],
                env=environment,
                cwd=self._log.parent,  # the python backend imports from there first
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._process

    def start(self) -> None:
        """Start, and wait until every model is ready."""
        process, limit = self.launch(), time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert process.poll() is None, self.log
            assert time.monotonic() < limit, self.log
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(STOP_SECONDS)
        self.kill()  # a server that gives up leaves its models' processes
        return status

    def kill(self) -> None:
        """SIGKILL to it and the processes of its models; their shared memory goes, too."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        for region in Path("/dev/shm").glob(f"{self._region}*"):
            region.unlink(missing_ok=True)

    def metric(self, name: str, model: str) -> float:
        """The sum of a metric over a model's versions."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"{name}{{") and f'model="{model}"' in line
        )
