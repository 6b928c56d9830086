"""A request → let through, or refused: token, host and origin; and headers that bind a browser."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medsa_deploy.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/", "/page.css", "/page.js", "/icon.svg", "/healthz")
"""Paths without data: they need no token."""
LEAST_TOKEN = 16
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Access:
    """An application that only its users reach.

    Without a token, requests must name a loopback host: a page of another site cannot make a
    browser ask under its own name. A request of a page must come from this server's own.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str] | None) -> None:
        """`hosts`: names that a request may have this server under; None for any."""
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def send_bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer[name] = value
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        if refusal is None:
            await self.app(scope, receive, send_bound)
            return
        status, detail = refusal
        body = json.dumps({"detail": detail}).encode()
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 401:
            fields.append((b"www-authenticate", b"Bearer"))
        await send_bound({"type": "http.response.start", "status": status, "headers": fields})
        await send_bound({"type": "http.response.body", "body": body})

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason, or None."""
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            return 403, f"this server is not {host!r:.80}: use http://127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests of other sites are refused"
        if self.token is not None and path not in OPEN_PATHS:
            scheme, _, given_token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                given_token.strip().encode(), self.token.encode()
            ):
                return 401, "a token is needed: Authorization: Bearer TOKEN"
        return None


def _host_name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def read_token(path: Path) -> str:
    """The first line of a file; UsageError if it is too short or cannot be a header."""
    try:
        token = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as a token: {e}") from e
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UsageError(
            f"the token in {path} should be {LEAST_TOKEN} printable ASCII characters or more: "
            "openssl rand -hex 24 > token.txt"
        )
    return token


def check_exposure(
    host: str, *, token: Path | None, certificate: Path | None, key: Path | None
) -> None:
    """UsageError for a server that others could reach without a token and TLS."""
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both")
    if host not in LOOPBACK and (token is None or certificate is None):
        raise UsageError(
            f"{host} can be reached from other machines: give --token FILE, --tls-cert FILE and "
            "--tls-key FILE, or serve on 127.0.0.1"
        )
