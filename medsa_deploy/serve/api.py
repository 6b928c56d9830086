"""The page's protocol: files come in, pixels go out to be shown, and masks for prompts.

Prompts stay with the client: every request for masks carries all of them, so undo is a request with
fewer, and a server that was restarted needs the image again, nothing else.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from medsa_deploy.errors import MedsaError, UsageError, one_line
from medsa_deploy.images.volume import Volume
from medsa_deploy.runtime import VolumePrediction

from .bodies import json_object, save_body
from .exports import export, export_format, styles_of
from .frames import frame, runs
from .images import OpenImage, open_files
from .leases import Lease
from .openapi import documentation, openapi
from .refusals import CancelledError, UnknownError, status_of
from .segmenting import parse_request
from .service import Service, disconnected
from .work import Job

MOST_FILES = 5000
MOST_SLICES = 64
"""Slices of pixels in one answer."""
WIRE_BYTES = 64 * 2**20


def api_routes(service: Service) -> list[Route]:
    """The routes below `/api`."""
    page = _Api(service)
    return [
        Route("/api/lease", page.claim, methods=["POST"]),
        Route("/api/lease", page.release, methods=["DELETE"]),
        Route("/api/lease", page.heartbeat, methods=["GET"]),
        Route("/api/bundles", page.bundles, methods=["GET"]),
        Route("/api/folder", page.folder, methods=["GET"]),
        Route("/api/files", page.forget_files, methods=["DELETE"]),
        Route("/api/files/{name}", page.upload, methods=["PUT"]),
        Route("/api/image", page.open_image, methods=["POST"]),
        Route("/api/pixels", page.pixels, methods=["GET"]),
        Route("/api/masks", page.masks, methods=["POST"]),
        Route("/api/export", page.export, methods=["POST"]),
        Route("/api/openapi.json", page.openapi, methods=["GET"]),
        Route("/api", page.documentation, methods=["GET"]),
    ]


class _Api:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def claim(self, request: Request) -> Response:
        """A new lease."""
        lease = self.service.leases.claim()
        options = self.service.options
        return JSONResponse(
            {
                "lease": lease.token,
                "idle_seconds": options.idle_seconds,
                "liveness_seconds": options.liveness_seconds,
                "upload_bytes": options.upload_bytes,
                "folder": options.images is not None,
            }
        )

    async def release(self, request: Request) -> Response:
        """End a lease."""
        self.service.leases.end(self.service.lease(request), "released")
        return JSONResponse({})

    async def heartbeat(self, request: Request) -> Response:
        """Seconds that a lease has left without an action."""
        lease = self.service.lease(request, acts=False)
        return JSONResponse({"remaining_seconds": self.service.leases.remaining(lease)})

    async def bundles(self, request: Request) -> Response:
        """The bundles' facts."""
        return JSONResponse({"bundles": [bundle.facts for bundle in self.service.bundles]})

    async def folder(self, request: Request) -> Response:
        """What lies in a folder of the server."""
        self.service.lease(request)
        folder = self._server_path(request.query_params.get("path", ""))
        if not folder.is_dir():
            raise UnknownError("there is no such folder")
        entries = [
            {"name": entry.name, "folder": entry.is_dir()}
            for entry in sorted(folder.iterdir())
            if not entry.name.startswith(".")
        ]
        return JSONResponse({"entries": entries[:MOST_FILES]})

    async def forget_files(self, request: Request) -> Response:
        """Drop the files that were sent, before others are."""
        _empty(self.service.lease(request))
        return JSONResponse({})

    async def upload(self, request: Request) -> Response:
        """One file of an image. Its name decides its format, if its content does not."""
        lease = self.service.lease(request)
        if lease.files >= MOST_FILES:
            raise UsageError(f"more than {MOST_FILES} files were sent: send one series")
        lease.files += 1
        path = lease.folder / "files" / f"{lease.files:05d}{_suffixes(request.path_params['name'])}"
        path.parent.mkdir(exist_ok=True)
        left = self.service.options.upload_bytes - sum(
            file.stat().st_size for file in path.parent.iterdir()
        )
        size = await save_body(request, path, most_bytes=max(0, left))
        lease.act()
        self.service.metrics.count("medsa_serve_upload_bytes_total", size)
        return JSONResponse({"bytes": size})

    async def open_image(self, request: Request) -> Response:
        """Read the files that were sent, or a file of the server's folder."""
        lease = self.service.lease(request)
        named = (await json_object(request)).get("path")
        if named is not None and not isinstance(named, str):
            raise UsageError("path should be the name of a file or folder")
        path = lease.folder / "files" if named is None else self._server_path(named)
        if not path.exists() or (named is None and not any(path.iterdir())):
            raise UsageError("no file was sent: send one, or name one of the server's folder")
        room = self.service.image_room(lease)

        def work(job: Job) -> tuple[OpenImage, dict[str, Any]]:
            with_path = _without_folder(path)
            try:
                image = open_files(path, most_bytes=room, check=job.check)
                return image, image.facts()
            except MedsaError as e:
                e.args = (with_path(str(e)),)
                raise

        image, facts = await self.service.run(request, work, lease=lease, long=True)
        self.service.hold(lease, image)
        return JSONResponse(facts)

    async def pixels(self, request: Request) -> Response:
        """Pixels of slices, one after the other."""
        image = self.service.lease(request).require_image()
        first, last = (_number(request, name) for name in ("first", "last"))
        total = len(image.volume)
        if not 0 <= first < last <= total or last - first > MOST_SLICES:
            raise UsageError(
                f"the slices {first}…{last} were asked for, expected at most {MOST_SLICES} of "
                f"0…{total}"
            )
        content = await asyncio.to_thread(image.pixels, first, last)
        return Response(content, media_type="application/octet-stream")

    async def masks(self, request: Request) -> Response:
        """Labels of a request's structures, slice by slice."""
        lease = self.service.lease(request)
        image, data = lease.require_image(), await json_object(request)
        bundle = self.service.bundles.find(_text(data.get("bundle")))
        wish = parse_request(data)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

        def send(content: bytes | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, content)

        def work(job: Job) -> None:
            try:
                prediction = self.service.segment(
                    bundle,
                    image,
                    wish,
                    job,
                    on_slice=lambda done, total: send(_progress(done, total)),
                    on_labels=lambda index, plane: send(_labels(index, plane)),
                )
                send(frame({"kind": "end"} | _summary(prediction, image.volume)))
            except MedsaError as e:
                send(frame({"kind": "error", "status": status_of(e), "detail": str(e)}))
            except Exception as e:
                self.service.events.write("fault", {"text": one_line(e)}, kind=type(e).__name__)
                send(frame({"kind": "error", "status": 500, "detail": "the server failed"}))
            finally:
                send(None)

        job = self.service.pool.submit(work, long=wish.propagate)
        answer = _answer(request, lease, job, queue)
        return StreamingResponse(answer, media_type="application/octet-stream")

    async def export(self, request: Request) -> Response:
        """A file with the labels of a request's structures."""
        lease = self.service.lease(request)
        image, data = lease.require_image(), await json_object(request)
        bundle = self.service.bundles.find(_text(data.get("bundle")))
        wish, chosen = parse_request(data), export_format(data.get("format"))
        styles = styles_of(data)
        index = min(wish.near or 0, len(image.volume) - 1)

        def work(job: Job) -> bytes:
            prediction = self.service.segment(bundle, image, wish, job)
            return export(
                image,
                prediction,
                chosen,
                bundle.details,
                styles=styles,
                index=index,
                folder=lease.folder,
            )

        content = await self.service.run(request, work, lease=lease, long=True)
        name = f"segmentation{chosen.suffix}"
        disposition = f"attachment; filename*=UTF-8''{quote(name)}"
        return Response(
            content, media_type=chosen.media_type, headers={"Content-Disposition": disposition}
        )

    async def openapi(self, request: Request) -> Response:
        """The description of this protocol."""
        return JSONResponse(openapi())

    async def documentation(self, request: Request) -> Response:
        """The description as a page."""
        return Response(documentation(), media_type="text/html")

    def _server_path(self, name: str) -> Path:
        """A path below the server's folder; UnknownError for any other."""
        root = self.service.options.images
        if root is None:
            raise UnknownError("this server has no folder of images")
        root = root.resolve()
        try:
            path = (root / name).resolve()
        except (ValueError, OSError):  # a null byte, a name that is too long
            path = root.parent
        if not path.is_relative_to(root) or not path.exists():
            raise UnknownError(f"there is no {name!r:.80} in the server's folder")
        return path


async def _answer(
    request: Request, lease: Lease, job: Job, queue: asyncio.Queue[bytes | None]
) -> AsyncIterator[bytes]:
    """Frames as they come; the job ends with the client or its lease."""
    gone = asyncio.ensure_future(disconnected(request))
    try:
        with lease.working(job):
            while True:
                item = asyncio.ensure_future(queue.get())
                await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    return
                content = item.result()
                if content is None:
                    return
                yield content
    finally:
        job.cancel(CancelledError("the client has gone"))
        gone.cancel()
        lease.act()


def _progress(done: int, total: int) -> bytes:
    return frame({"kind": "encoded", "done": done, "total": total})


def _labels(index: int, plane: NDArray[np.uint8]) -> bytes:
    return frame({"kind": "labels", "slice": index}, runs(plane))


def _summary(prediction: VolumePrediction, volume: Volume) -> dict[str, Any]:
    """What is known once every slice is segmented."""
    planes = [volume.plane(prediction.labels, index) for index in prediction.slices]
    counts = sum(
        (np.bincount(plane.ravel(), minlength=len(prediction.names) + 1) for plane in planes),
        np.zeros(len(prediction.names) + 1, np.int64),
    )
    return {
        "names": list(prediction.names),
        "voxels": [int(count) for count in counts[1:]],
        "slices": list(prediction.slices),
        "intensity_window": prediction.intensity_window,
        "timings_ms": {key: round(ms, 2) for key, ms in prediction.timings_ms.items()},
        "degraded": prediction.degraded,
    }


def _empty(lease: Lease) -> None:
    shutil.rmtree(lease.folder / "files", ignore_errors=True)
    lease.files = 0


def _suffixes(name: str) -> str:
    """The suffixes of a file's name that can be a format's."""
    last = Path(name).name[-40:].lower()
    parts = [part for part in last.split(".")[1:] if part.isascii() and part.isalnum()]
    return "".join(f".{part[:8]}" for part in parts[-2:] if not part.isdecimal())


def _without_folder(path: Path) -> Any:
    """A function that leaves the server's own folders out of a message."""
    folders = sorted({str(path.resolve()), str(path)}, key=len, reverse=True)

    def cleaned(message: str) -> str:
        for folder in folders:
            parent = folder if path.is_dir() else str(Path(folder).parent)
            message = message.replace(f"{parent}/", "").replace(parent, "the image")
        return one_line(ValueError(message)) if len(message) > 1000 else message

    return cleaned


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{name} should be a whole number")
    return int(text)


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError("bundle should be the name of a bundle")
    return value
