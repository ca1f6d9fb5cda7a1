"""`/openapi.json`: the routes and what they take, from the types and the table by which requests are read."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import Raw

from kvasir.gateway.edges import anthropic_requests, openai_requests, responses_requests
from kvasir.gateway.edges.request_fields import FIELDS, Place
from kvasir.gateway.edges.token_routes import DetokenizeBody, TokenizeBody

_BODIES: dict[str, tuple[str, type, Place | None]] = {  # by path: what it does, what it reads, its place in the table
    "/v1/chat/completions": ("Answer a chat", openai_requests.CHAT_TYPE, "chat"),
    "/v1/completions": ("Complete texts", openai_requests.COMPLETION_TYPE, "completions"),
    "/v1/responses": ("Answer a chat, as OpenAI's Responses", responses_requests.TYPE, "responses"),
    "/v1/messages": ("Answer a chat, as Anthropic's Messages", anthropic_requests.TYPE, "anthropic"),
    "/v1/messages/count_tokens": ("Count the tokens of a message's prompt", anthropic_requests.TYPE, "anthropic"),
    "/tokenize": ("Turn a text or a chat into token ids", TokenizeBody, None),
    "/detokenize": ("Turn token ids into text", DetokenizeBody, None),
}
_QUESTIONS = {
    "/v1/models": "List the models that the key may use",
    "/v1/models/{model}": "Show one model",
    "/version": "Show the gateway's version",
    "/health": "Say whether there are workers; needs no key",
    "/metrics": "Show metrics for Prometheus; needs the token of --metrics-token-file",
    "/openapi.json": "Show this document; needs no key",
}
_ABSENT: Any = msgspec.field(default_factory=Raw)
_PARAMETERS = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]


@cache
def openapi(version: str) -> bytes:
    """Return the document, OpenAPI 3.1 in JSON."""
    paths: dict[str, Any] = {path: {"get": _operation(summary)} for path, summary in _QUESTIONS.items()}
    paths["/v1/models/{model}"]["parameters"] = _PARAMETERS
    shown = {kind: _shown(kind) for _, kind, _ in _BODIES.values()}
    references, schemas = msgspec.json.schema_components(shown.values(), ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(shown, references, strict=True))
    for path, (summary, kind, place) in _BODIES.items():
        content = {"application/json": {"schema": by_kind[kind]}}
        paths[path] = {"post": {**_operation(summary), "requestBody": {"required": True, "content": content}}}
        properties = schemas[kind.__name__]["properties"]
        for row in FIELDS if place is not None else ():
            for name in row.names.split() if place in row.places and row.verdict != "refused" else ():
                properties[name]["description"] = f"{row.verdict}: {row.note}"
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


def _operation(summary: str) -> dict[str, Any]:
    answers = {"200": {"description": "as the summary says"}, "default": {"description": "an error object"}}
    return {"summary": summary, "responses": answers}


def _shown(kind: type) -> type:
    """Return `kind` without default values: `Raw()`, of what is decoded later, has none that a schema could show."""
    fields = [
        (field.encode_name, field.type) if field.required else (field.encode_name, field.type, _ABSENT)
        for field in msgspec.structs.fields(kind)
    ]
    return msgspec.defstruct(kind.__name__, fields, kw_only=True, forbid_unknown_fields=True)
