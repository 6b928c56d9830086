"""nnInteractive's protocol: a lease holds one image and the prompts of one object at a time.

Its routes lie at the root, for the first bundle and its first class; `/models/BUNDLE` and
`/models/BUNDLE/CLASS` are the same for others. Auto-zoom of the protocol is `propagate` here.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medsa_deploy.errors import PromptError, UsageError

from .array_wire import TYPES, pack, unpack
from .bodies import is_number, json_object, parse_object, read_body
from .bundles import ServedBundle
from .images import OpenImage, open_array
from .initial_mask import InitialMask
from .interaction import Interaction, Prompts, bounds
from .leases import Lease
from .refusals import LeaseError, UnknownError, UnsupportedError
from .service import Service
from .work import Job

SESSION_VERSION = 2
UNKNOWN = 255
"""In place of a client's mask that this server does not know: all of it is sent again."""
PREFIXES = ("", "/models/{bundle}", "/models/{bundle}/{class_name}")


def nninteractive_routes(service: Service) -> list[Route]:
    """The routes, for the first bundle and for each by its name."""
    protocol = _Protocol(service)
    unsupported = ("/add_scribble_interaction", "/add_lasso_interaction")
    handlers = {
        "/claim": protocol.claim,
        "/release": protocol.release,
        "/heartbeat": protocol.heartbeat,
        "/set_image": protocol.set_image,
        "/set_target_buffer": protocol.set_target_buffer,
        "/set_do_autozoom": protocol.set_do_autozoom,
        "/reset_interactions": protocol.reset,
        "/add_point_interaction": protocol.add_point,
        "/add_bbox_interaction": protocol.add_box,
        "/predict": protocol.predict,
        "/undo": protocol.undo,
        "/add_initial_seg_interaction": protocol.add_initial,
    } | dict.fromkeys(unsupported, protocol.unsupported)
    routes = []
    for prefix in PREFIXES:
        routes += [Route(prefix + path, h, methods=["POST"]) for path, h in handlers.items()]
        routes.append(Route(f"{prefix}/capabilities", protocol.capabilities, methods=["GET"]))
        routes.append(Route(f"{prefix}/lease_status", protocol.lease_status, methods=["GET"]))
        if prefix:
            routes.append(Route(f"{prefix}/healthz", protocol.health, methods=["GET"]))
    return routes


class _Protocol:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def claim(self, request: Request) -> Response:
        """A lease, on the bundle and class of the path."""
        bundle, class_name = self._target(request)
        lease = self.service.leases.claim()
        lease.interaction = Interaction(
            bundle=bundle, class_name=class_name, propagate=self.service.options.propagate
        )
        return JSONResponse(
            {
                "lease_token": lease.token,
                "idle_timeout_seconds": self.service.options.idle_seconds,
                "liveness_timeout_seconds": self.service.options.liveness_seconds,
            }
        )

    async def capabilities(self, request: Request) -> Response:
        """What this server does of the protocol."""
        bundle, _ = self._target(request)
        masks = bundle.facts["mask_prompts"]
        return JSONResponse(
            {
                "supported_interactions": {
                    "points": bundle.session.conventions.prompts != "none",
                    "bbox2d": bundle.session.conventions.prompts != "none",
                    "bbox3d": False,
                    "scribble": False,
                    "lasso": False,
                },
                "channel_mapping": {},
                "num_interaction_channels": 0,
                "supports_initial_label": masks,
                "supports_zero_shot_label_refinement": masks,
                "supports_undo": True,
                "preferred_scribble_thickness": [1, 1, 1],
                "interaction_decay": 1.0,
                "inference_session_version": SESSION_VERSION,
                "do_autozoom": self.service.options.propagate,
                "license": f"that of the bundle {bundle.name}",
            }
        )

    async def health(self, request: Request) -> Response:
        """The bundle of the path is served."""
        return JSONResponse({"status": "ok", "bundle": self._target(request)[0].name})

    async def lease_status(self, request: Request) -> Response:
        """How long a lease has left, without prolonging it."""
        lease = self.service.lease(request, acts=False)
        return JSONResponse(
            {
                "remaining_seconds": self.service.leases.remaining(lease),
                "idle_timeout_seconds": self.service.options.idle_seconds,
            }
        )

    async def heartbeat(self, request: Request) -> Response:
        """The client lives."""
        return await self.lease_status(request)

    async def release(self, request: Request) -> Response:
        """End a lease."""
        self.service.leases.end(self.service.lease(request), "released")
        return JSONResponse({})

    async def set_image(self, request: Request) -> Response:
        """An array (1, X, Y, Z), with its spacing."""
        lease, interaction = self._lease(request)
        spacing = _spacing(_meta(request))
        body = await read_body(request, most_bytes=self.service.options.upload_bytes)
        self.service.metrics.count("medsa_serve_upload_bytes_total", len(body))
        room = self.service.image_room(lease)

        def work(job: Job) -> OpenImage:
            array = unpack(body, most_bytes=room)
            if array.ndim != 4 or array.shape[0] != 1:
                raise UsageError(f"the image has shape {array.shape}, expected (1, X, Y, Z)")
            job.check()
            return open_array(array[0], spacing, most_bytes=room)

        image = await self.service.run(request, work, lease=lease, long=True)
        self.service.hold(lease, image)
        interaction.forget()
        return JSONResponse({"original_image_shape": [1, *image.volume.shape]})

    async def set_target_buffer(self, request: Request) -> Response:
        """The client has a buffer of zeros."""
        lease, interaction = self._lease(request)
        image, data = lease.require_image(), await json_object(request)
        if data.get("shape") != list(image.volume.shape):
            raise UsageError(
                f"the target buffer has shape {data.get('shape')!r:.60}, expected "
                f"{list(image.volume.shape)}"
            )
        if data.get("dtype") not in TYPES:
            raise UsageError(f"the target buffer holds {data.get('dtype')!r:.20}")
        interaction.dtype = data["dtype"]
        interaction.forget()
        return JSONResponse({})

    async def set_do_autozoom(self, request: Request) -> Response:
        """Whether structures are followed through the volume."""
        _, interaction = self._lease(request)
        interaction.propagate = bool((await json_object(request)).get("do_autozoom", False))
        return JSONResponse({})

    async def reset(self, request: Request) -> Response:
        """The next object begins; the client has emptied its buffer."""
        _, interaction = self._lease(request)
        interaction.forget()
        return JSONResponse({})

    async def add_point(self, request: Request) -> Response:
        """A click."""
        lease, interaction = self._lease(request)
        data = await json_object(request)
        point = _numbers(data.get("coordinates"), 3, "coordinates should be three voxel indices")
        prompts = interaction.prompts
        added = replace(
            prompts,
            points=(*prompts.points, (point[0], point[1], point[2])),
            labels=(*prompts.labels, int(_flag(data, "include_interaction"))),
        )
        return await self._add(request, lease, interaction, added, data, point)

    async def add_box(self, request: Request) -> Response:
        """A box; [[x0, x1], [y0, y1], [z0, z1]] in voxels, each second one past the last."""
        lease, interaction = self._lease(request)
        data = await json_object(request)
        if not _flag(data, "include_interaction"):
            raise UnsupportedError("negative boxes are not supported: use negative clicks")
        rows = data.get("bbox_coords")
        if not isinstance(rows, list) or len(rows) != 3:
            raise PromptError("bbox_coords should be three pairs of voxel indices")
        pairs = [_numbers(row, 2, "bbox_coords should be pairs of numbers") for row in rows]
        (x0, x1), (y0, y1), (z0, z1) = pairs
        axis = lease.require_image().volume.axis
        added = interaction.prompts.with_box((x0, y0, z0, x1, y1, z1), axis)
        middle = [(low + high - 1) // 2 for low, high in pairs]
        return await self._add(request, lease, interaction, added, data, middle)

    async def predict(self, request: Request) -> Response:
        """The mask of the prompts so far."""
        lease, interaction = self._lease(request)
        await json_object(request)
        prompts = interaction.prompts
        if prompts == Prompts():
            return _answer(None)
        with interaction.trying(
            replace(prompts, again=prompts.again or not prompts.drawn), interaction.earlier
        ):
            return await self._predict(request, lease, interaction, None)

    async def undo(self, request: Request) -> Response:
        """Take the latest prompt back."""
        lease, interaction = self._lease(request)
        if not interaction.earlier:
            return _answer(None)
        *earlier, prompts = interaction.earlier
        with interaction.trying(prompts, earlier):
            return await self._predict(request, lease, interaction, None)

    async def unsupported(self, request: Request) -> Response:
        """Scribbles and lassos."""
        self._lease(request)
        raise UnsupportedError("this network takes points and boxes only: click, or drag a box")

    async def add_initial(self, request: Request) -> Response:
        """A mask (X, Y, Z) of the next object, other than 0 inside; the client has drawn it."""
        lease, interaction = self._lease(request)
        image = lease.require_image()
        shape = image.volume.shape
        interaction.mask = np.full(shape, UNKNOWN, np.uint8)
        if not interaction.bundle.facts["mask_prompts"]:
            raise UnsupportedError(
                "this network takes no mask prompt: begin the object with a click or a box"
            )
        again = _flag(_meta(request), "run_prediction", default=False)
        body = await read_body(request, most_bytes=self.service.options.upload_bytes)

        def work(job: Job) -> NDArray[np.bool_]:
            array = unpack(body, most_bytes=8 * math.prod(shape))
            if array.shape != shape:
                raise UsageError(f"the mask has shape {array.shape}, expected {shape}")
            return np.asarray(array != 0)

        inside = await self.service.run(request, work, lease=lease)
        interaction.mask = inside.astype(np.uint8)
        planes = np.ascontiguousarray(inside.transpose(image.volume.axis, *image.volume.plane_axes))
        prompts = Prompts(initial=InitialMask(planes), again=again) if inside.any() else Prompts()
        # an older mask is not kept any longer for undo
        with interaction.trying(prompts, [interaction.prompts]):
            if not again:
                return _answer(None)
            return await self._predict(request, lease, interaction, None)

    async def _add(
        self,
        request: Request,
        lease: Lease,
        interaction: Interaction,
        added: Prompts,
        data: dict[str, Any],
        place: list[float],
    ) -> Response:
        """Add prompts, which are dropped again if they cannot be used."""
        with interaction.trying(added, [*interaction.earlier, interaction.prompts]):
            if not data.get("run_prediction", True):
                return _answer(None)
            return await self._predict(request, lease, interaction, place)

    async def _predict(
        self, request: Request, lease: Lease, interaction: Interaction, place: list[float] | None
    ) -> Response:
        """Segment, and answer what has changed in the client's buffer."""
        image = lease.require_image()
        near = None if place is None else int(place[image.volume.axis])

        def work(job: Job) -> tuple[NDArray[np.uint8], bool]:
            return interaction.segment(self.service, image, near, job)

        long = interaction.propagate
        mask, complete = await self.service.run(request, work, lease=lease, long=long)
        before = interaction.mask
        interaction.mask = mask
        return _answer(mask, before, interaction.dtype, complete=complete)

    def _target(self, request: Request) -> tuple[ServedBundle, str | None]:
        """The bundle and class of a path; None for a network of one class."""
        bundle = self.service.bundles.find(request.path_params.get("bundle"))
        class_name = request.path_params.get("class_name")
        classes = bundle.session.classes
        if class_name is not None and class_name not in classes:
            raise UnknownError(f"there is no class {class_name!r}: {', '.join(classes)}")
        if not bundle.facts["several_classes"]:
            return bundle, None
        return bundle, class_name or classes[0]

    def _lease(self, request: Request) -> tuple[Lease, Interaction]:
        """The lease of a request, and its state."""
        lease = self.service.lease(request)
        if not isinstance(lease.interaction, Interaction):
            raise LeaseError("this lease is of another protocol: claim one")
        return lease, lease.interaction


def _answer(
    mask: NDArray[np.uint8] | None,
    before: NDArray[np.uint8] | None = None,
    dtype: str = "uint8",
    *,
    complete: bool = True,
) -> Response:
    """The box of what has changed, and the mask within; without a mask nothing was predicted."""
    meta: dict[str, Any] = {"ran_prediction": mask is not None, "bbox": None}
    content = b""
    if mask is not None:
        meta["complete"] = complete
        changed = mask != 0 if before is None else mask != before
        if (box := bounds(changed)) is not None:
            meta["bbox"] = box
            inside = mask[tuple(slice(low, high) for low, high in box)]
            content = pack(inside.astype(dtype))
    return Response(
        content,
        media_type="application/octet-stream",
        headers={"X-Meta": json.dumps(meta, separators=(",", ":"))},
    )


def _meta(request: Request) -> dict[str, Any]:
    """The JSON beside a packed array."""
    return parse_object(request.headers.get("x-meta", "{}"))


def _spacing(meta: dict[str, Any]) -> list[float]:
    """The spacing of an image's properties; [] without."""
    properties = meta.get("image_properties")
    spacing = properties.get("spacing") if isinstance(properties, dict) else None
    if spacing is None:
        return []
    return _numbers(spacing, 3, "the spacing should be three lengths in mm")


def _numbers(value: Any, count: int, expected: str) -> list[float]:
    """A list of finite numbers; PromptError, which says what was `expected`."""
    if not isinstance(value, list) or len(value) != count:
        raise PromptError(expected)
    if not all(map(is_number, value)):
        raise PromptError(f"{expected}, found {value!r:.60}")
    return [float(v) for v in value]


def _flag(data: dict[str, Any], name: str, *, default: bool = True) -> bool:
    value = data.get(name, default)
    if type(value) is not bool:
        raise PromptError(f"{name} should be true or false")
    return value
