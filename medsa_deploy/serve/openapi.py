"""The page's protocol, described: as OpenAPI, and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from medsa_deploy import __version__


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route and method."""

    method: str
    path: str
    summary: str
    needs_lease: bool = True
    parameters: tuple[tuple[str, str], ...] = ()
    """Name and place: path or query."""
    body: str | None = None
    """Name of a schema, or `bytes`."""
    answer: str = "application/json"


OPERATIONS = (
    Operation(method="post", path="/api/lease", needs_lease=False,
              summary="A lease: send its token as X-Lease-Token with every request"),
    Operation(method="get", path="/api/lease",
              summary="Heartbeat; how long the lease has left without an action"),
    Operation(method="delete", path="/api/lease", summary="End the lease"),
    Operation(method="get", path="/api/bundles", needs_lease=False,
              summary="Bundles: names, classes, what they take as prompts"),
    Operation(method="get", path="/api/folder", parameters=(("path", "query"),),
              summary="What lies in a folder of the server (--images)"),
    Operation(method="delete", path="/api/files", summary="Drop the files that were sent"),
    Operation(method="put", path="/api/files/{name}", parameters=(("name", "path"),),
              body="bytes", summary="Send a file; a DICOM series is several"),
    Operation(method="post", path="/api/image", body="Image",
              summary="Read the files that were sent, or one of the server's folder"),
    Operation(method="get", path="/api/pixels", answer="application/octet-stream",
              parameters=(("first", "query"), ("last", "query")),
              summary="Pixels of slices first … last − 1, little endian, row by row"),
    Operation(method="post", path="/api/masks", body="Prompts", answer="application/octet-stream",
              summary="Labels of all structures, the near slice first. Frames: uint32 length of "
              "JSON, uint32 length of labels, JSON, labels. kind: encoded, labels, end, error. "
              "Labels are runs along the rows, uint32: label << 24 | length"),
    Operation(method="post", path="/api/export", body="Export", answer="application/octet-stream",
              summary="The labels as a file"),
)  # fmt: skip

POINTS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
STRUCTURE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "class": {"type": "string"},
        "points": POINTS | {"description": "x, y, z in voxels; a 4th number 0 is background"},
        "boxes": POINTS | {"description": "x0, y0, z0, x1, y1, z1 in voxels"},
        "colour": {"type": "string", "example": "#dd8265"},
    },
}
PROMPTS = {
    "bundle": {"type": "string", "description": "a bundle's name; the first without"},
    "structures": {"type": "array", "items": {"$ref": "#/components/schemas/Structure"}},
    "near": {"type": "integer", "description": "the slice to begin with"},
    "propagate": {"type": "boolean", "description": "follow the structures through the volume"},
    "intensity_window": {"description": '[LOW, HIGH], "auto" or null for the bundle\'s'},
    "threshold": {"type": "number"},
}
FORMATS = {"format": {"enum": ["nifti", "dicom-seg", "nrrd", "png"]}}
SCHEMAS: dict[str, Any] = {
    "Structure": STRUCTURE,
    "Image": {"type": "object", "properties": {"path": {"type": "string"}}},
    "Prompts": {"type": "object", "properties": PROMPTS},
    "Export": {"type": "object", "properties": PROMPTS | FORMATS, "required": ["format"]},
    "Error": {"type": "object", "properties": {"detail": {"type": "string"}}},
}


def openapi() -> dict[str, Any]:
    """The description, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "medsa-deploy serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def documentation() -> str:
    """A page that lists the operations."""
    rows = "".join(
        f"<tr><td><code>{operation.method.upper()}</code></td>"
        f"<td><code>{escape(operation.path)}</code></td><td>{escape(operation.summary)}</td></tr>"
        for operation in OPERATIONS
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>medsa-deploy serve: API'
        '</title><link rel="stylesheet" href="/page.css"><body class="document"><main>'
        "<h1>API</h1><p>The same for programs: <a href='/api/openapi.json'>openapi.json</a>.</p>"
        f"<table>{rows}</table></main></body></html>"
    )


def _described(operation: Operation) -> dict[str, Any]:
    """One operation as OpenAPI has it."""
    parameters = [
        {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
        for name, place in operation.parameters
    ]
    if operation.needs_lease:
        lease = {"name": "X-Lease-Token", "in": "header", "required": True}
        parameters.append(lease | {"schema": {"type": "string"}})
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {
            "200": {"description": "done", "content": {operation.answer: {}}},
            "4XX": {"description": "the request is refused"} | error,
            "503": {"description": "too much work: see Retry-After"} | error,
        },
    }
    if operation.body == "bytes":
        described["requestBody"] = {"content": {"application/octet-stream": {}}}
    elif operation.body is not None:
        schema = {"schema": {"$ref": f"#/components/schemas/{operation.body}"}}
        described["requestBody"] = {"content": {"application/json": schema}}
    return described
