"""Options → a running server: uvicorn in a thread, until it is stopped."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from time import monotonic

import uvicorn

from medsa_deploy.errors import UsageError, one_line
from medsa_deploy.event_log import EventLog

from .access import check_exposure, read_token
from .app import application
from .service import ServeOptions, Service

STOP_SECONDS = 5
"""Time that answers have to end."""
MOST_CONNECTIONS = 512
START_SECONDS = 30.0


class Server:
    """A server on a port; a context manager.

    Its end refuses new work, cancels what runs, so that clients are told, and then closes.
    """

    def __init__(self, options: ServeOptions, events: EventLog) -> None:
        """UsageError for options that cannot be used, BundleError for a bundle."""
        check_exposure(
            options.host,
            token=options.token,
            certificate=options.tls_certificate,
            key=options.tls_key,
        )
        token = None if options.token is None else read_token(options.token)
        self.options, self.events = options, events
        with ExitStack() as opened:
            self._socket = opened.enter_context(_listen(options.host, options.port))
            self.service = opened.enter_context(Service(options, events))
            self._opened = opened.pop_all()
        self._uvicorn = uvicorn.Server(self._config(token))
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    @property
    def port(self) -> int:
        """The port, chosen by the system if 0 was asked for."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Its address."""
        scheme = "http" if self.options.tls_certificate is None else "https"
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{scheme}://{host}:{self.port}"

    def __enter__(self) -> Server:
        self._thread.start()
        limit = monotonic() + START_SECONDS
        while not self._uvicorn.started:
            self._thread.join(0.01)
            if not self._thread.is_alive() or monotonic() > limit:
                self.__exit__()
                raise UsageError(f"the server cannot start on {self.url}")
        self.events.write(
            "started",
            url=self.url,
            bundles=[bundle.name for bundle in self.service.bundles],
            token=self.options.token is not None,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.service.pool.stop()
        self._uvicorn.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._opened.close()
        self.events.write("stopped")

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def _config(self, token: str | None) -> uvicorn.Config:
        options = self.options
        try:
            config = uvicorn.Config(
                application(self.service, token=token),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
                ssl_certfile=options.tls_certificate,
                ssl_keyfile=options.tls_key,
            )
            config.load()  # reads the certificate
        except OSError as e:  # ssl.SSLError is one
            self._opened.close()
            raise UsageError(f"--tls-cert and --tls-key cannot be used: {one_line(e)}") from e
        return config

    def _run(self) -> None:
        self._uvicorn.run(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as e:
        listening.close()
        raise UsageError(
            f"{host}:{port} cannot be listened on: {e.strerror or one_line(e)}; choose another port"
        ) from e
    return listening
