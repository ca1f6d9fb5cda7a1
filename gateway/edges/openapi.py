"""`/openapi.json`: the routes and what they take, from the types and the table by which requests are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Raw

from kvasir.gateway.edges.http_call import HttpCall
from kvasir.gateway.edges.request_fields import FIELDS, Place
from kvasir.gateway.http.response import HttpResponse


class Route(NamedTuple):
    """A path that is served. `body`: what its bodies are read as; `place`: of their fields in `request_fields`."""

    method: Literal["GET", "POST"]
    summary: str
    answer: Callable[[HttpCall], Awaitable[HttpResponse | None]]
    body: type | None = None
    place: Place | None = None


_ABSENT: Any = msgspec.field(default_factory=Raw)
_ANSWERS = {"200": {"description": "as the summary says"}, "default": {"description": "an error object"}}
_PARAMETERS = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]


def openapi(version: str, routes: Mapping[str, Route]) -> bytes:
    """Return the document, OpenAPI 3.1 in JSON."""
    shown = {route.body: _shown(route.body) for route in routes.values() if route.body is not None}
    references, schemas = msgspec.json.schema_components(shown.values(), ref_template="#/components/schemas/{name}")
    by_body = dict(zip(shown, references, strict=True))
    paths: dict[str, Any] = {}
    for path, route in routes.items():
        operation: dict[str, Any] = {"summary": route.summary, "responses": _ANSWERS}
        paths[path] = {route.method.lower(): operation}
        if "{model}" in path:
            paths[path]["parameters"] = _PARAMETERS
        if route.body is not None:
            content = {"application/json": {"schema": by_body[route.body]}}
            operation["requestBody"] = {"required": True, "content": content}
            _describe(schemas[route.body.__name__]["properties"], route.place)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Kvasir", "version": version, "description": "docs/api.md says more of every field."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": keys},
        "security": [{name: []} for name in keys],
    }
    return msgspec.json.encode(document)


def _describe(properties: dict[str, Any], place: Place | None) -> None:
    """Give each field what its row of the table says."""
    for row in FIELDS:
        if place in row.places and row.verdict != "refused":
            for name in row.names.split():
                properties[name]["description"] = f"{row.verdict}: {row.note}"


def _shown(kind: type) -> type:
    """Return `kind` without default values: `Raw()`, of what is decoded later, has none that a schema could show."""
    fields = [
        (field.encode_name, field.type) if field.required else (field.encode_name, field.type, _ABSENT)
        for field in msgspec.structs.fields(kind)
    ]
    return msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
