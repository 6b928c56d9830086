"""MONAI Label's protocol, as much as clients need to segment: info, session, infer.

A session is a lease, and a model is a bundle, or `BUNDLE:CLASS` for one of several classes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medsa_deploy.errors import UsageError
from medsa_deploy.runtime import Structure
from medsa_deploy.stages.run.prompt_file import structure_of

from .bodies import bounded, is_number, parse_object
from .bundles import ServedBundle
from .exports import FORMATS, export
from .images import OpenImage, open_files
from .leases import Lease
from .refusals import UnknownError
from .segmenting import SegmentRequest
from .service import Service
from .work import Job

PIECE = 2**20
Form = Mapping[str, Any]


def monai_label_routes(service: Service) -> list[Route]:
    """The routes."""
    protocol = _Protocol(service)
    return [
        Route("/info/", protocol.info, methods=["GET"]),
        Route("/session/", protocol.create, methods=["PUT"]),
        Route("/session/{token}", protocol.session, methods=["GET"]),
        Route("/session/{token}", protocol.remove, methods=["DELETE"]),
        Route("/infer/{model}", protocol.infer, methods=["POST"]),
    ]


class _Protocol:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def info(self, request: Request) -> Response:
        """The models."""
        models = {}
        for bundle in self.service.bundles:
            several_classes = bundle.facts["several_classes"]
            names = (
                [f"{bundle.name}:{c}" for c in bundle.session.classes] if several_classes else []
            )
            for name in names or [bundle.name]:
                label = name.rpartition(":")[2] if several_classes else bundle.session.classes[0]
                models[name] = {
                    "type": "deepgrow",
                    "labels": [label],
                    "dimension": 3,
                    "description": f"medsa-deploy, bundle {bundle.name}",
                    "config": {"propagate": self.service.options.propagate},
                }
        facts = {"name": "medsa-deploy", "description": "", "version": "", "models": models}
        return JSONResponse(
            facts | {"labels": [], "trainers": {}, "strategies": {}, "scoring": {}, "datastore": {}}
        )

    async def create(self, request: Request) -> Response:
        """A session on the image that is sent."""
        lease = self.service.leases.claim()
        try:
            async with await self._form(request) as form:
                sent = [value for value in form.values() if isinstance(value, UploadFile)]
                await self._open(request, lease, sent)
        except BaseException:
            self.service.leases.end(lease, "refused")
            raise
        return JSONResponse({"session_id": lease.token, "info": self._facts(lease)})

    async def session(self, request: Request) -> Response:
        """What a session holds."""
        return JSONResponse(self._facts(self._lease(request.path_params["token"])))

    async def remove(self, request: Request) -> Response:
        """End a session."""
        self.service.leases.end(self._lease(request.path_params["token"]), "released")
        return JSONResponse({})

    async def infer(self, request: Request) -> Response:
        """The labels of clicks or a box on a session's image, or on one that is sent."""
        token = request.query_params.get("session_id")
        bundle, class_name = self._model(request.path_params["model"])
        lease = self.service.leases.claim() if token is None else self._lease(token)
        try:
            async with await self._form(request) as form:
                params = parse_object(_text(form.get("params", "{}")))
                if token is None:
                    sent = [form["file"]] if isinstance(form.get("file"), UploadFile) else []
                    await self._open(request, lease, sent)
            wish = _wish(params, class_name, self.service.options.propagate)
            return await self._infer(request, lease, bundle, wish)
        finally:
            if token is None:
                self.service.leases.end(lease, "released")

    async def _infer(
        self, request: Request, lease: Lease, bundle: ServedBundle, wish: SegmentRequest
    ) -> Response:
        image = lease.require_image()
        chosen = FORMATS["nifti"]

        def work(job: Job) -> tuple[bytes, dict[str, Any]]:
            prediction = self.service.segment(bundle, image, wish, job)
            content = export(
                image,
                prediction,
                chosen,
                bundle.details,
                styles={},
                index=0,
                folder=lease.folder,
            )
            names = {name: label for label, name in enumerate(prediction.names, 1)}
            return content, {"label_names": names, "latencies": prediction.timings_ms}

        content, params = await self.service.run(request, work, lease=lease, long=True)
        return _multipart(params, "label.nii.gz", content)

    async def _open(self, request: Request, lease: Lease, sent: list[UploadFile]) -> None:
        """Give a lease the image of the files that were sent."""
        if not sent:
            raise UsageError("no image was sent: send files, or give a session_id")
        folder = lease.folder / "files"
        folder.mkdir()
        for number, upload in enumerate(sent):
            suffixes = "".join(Path(upload.filename or "").suffixes[-2:])
            if not suffixes.replace(".", "").isalnum():
                suffixes = ""
            with (folder / f"{number:05d}{suffixes[:16]}").open("wb") as f:
                while piece := await upload.read(PIECE):
                    f.write(piece)
        room = self.service.image_room(lease)

        def work(job: Job) -> OpenImage:
            return open_files(folder, most_bytes=room, check=job.check)

        self.service.hold(lease, await self.service.run(request, work, lease=lease, long=True))

    async def _form(self, request: Request) -> Any:
        most = self.service.options.upload_bytes
        return bounded(request, most_bytes=most).form(max_files=5000, max_part_size=2**20)

    def _lease(self, token: str) -> Lease:
        lease = self.service.leases.find(token)
        lease.act()
        return lease

    def _facts(self, lease: Lease) -> dict[str, Any]:
        shape = list(lease.require_image().volume.shape)
        return {"session_id": lease.token, "image_shape": shape}

    def _model(self, name: str) -> tuple[ServedBundle, str | None]:
        bundle_name, _, class_name = name.partition(":")
        bundle = self.service.bundles.find(bundle_name)
        if class_name and class_name not in bundle.session.classes:
            raise UnknownError(f"there is no class {class_name!r}")
        return bundle, class_name or None


def _wish(params: Mapping[str, Any], class_name: str | None, propagate: bool) -> SegmentRequest:
    """MONAI Label's parameters → a request. `roi`: x0, x1, y0, y1, z0, z1 in voxels."""
    rows = [[*point, label] for key, label in (("foreground", 1), ("background", 0))
            for point in _points(params.get(key))]  # fmt: skip
    roi = params.get("roi") or []
    if roi and not (isinstance(roi, list) and len(roi) == 6 and all(map(is_number, roi))):
        raise UsageError("roi should be x0, x1, y0, y1, z0, z1 in voxels")
    boxes = [(roi[0], roi[2], roi[4], roi[1], roi[3], roi[5])] if roi else []
    points = [tuple(float(v) for v in row) for row in rows]
    structures: tuple[Structure, ...] = ()
    if points or boxes:
        structures = (structure_of(points, boxes, class_name=class_name),)
    follow = params.get("propagate", propagate)
    return SegmentRequest(structures=structures, propagate=follow is True)


def _points(value: Any) -> list[list[float]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        isinstance(row, list) and len(row) == 3 and all(map(is_number, row)) for row in value
    ):
        raise UsageError("foreground and background should be lists of x, y, z in voxels")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError("params should be JSON")
    return value


def _multipart(params: Mapping[str, Any], name: str, content: bytes) -> Response:
    """JSON and a file, as the client reads them."""
    boundary = secrets.token_hex(16)
    parts = (
        ('name="params"', "application/json", json.dumps(params).encode()),
        (f'name="image"; filename="{name}"', "application/octet-stream", content),
    )
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n"
        f"Content-Type: {kind}\r\n\r\n".encode()
        + part
        + b"\r\n"
        for disposition, kind, part in parts
    )
    return Response(
        body + f"--{boundary}--\r\n".encode(),
        media_type=f"multipart/form-data; boundary={boundary}",
    )
