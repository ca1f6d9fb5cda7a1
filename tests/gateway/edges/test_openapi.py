"""`/openapi.json` says what the routes really take: every request of the corpus that counts is valid by it."""

from __future__ import annotations

from typing import Any

import jsonschema

from tests.edge_helpers import House, decoded, run
from tests.gateway.edges.corpus import body_of, corpus

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "anthropic": "/v1/messages",
}


def document() -> Any:
    found = []

    async def main(house: House) -> None:
        response, _ = await house.ask("/openapi.json", method="GET", key=None)
        found.append(decoded(response))

    run(main)
    return found[0]


def test_every_path_is_served_by_its_method_and_every_route_is_shown() -> None:
    paths = document()["paths"]
    assert len(paths) == 13

    async def main(house: House) -> None:
        for path, operations in paths.items():
            methods = {method for method in operations if method in ("get", "post")}
            for method in ("get", "post"):
                response, _ = await house.ask(path.replace("{model}", "demo"), {}, method=method.upper())
                assert response is not None and (response.status == 405) == (method not in methods)
                assert response.status != 404

    run(main)


def test_requests_that_count_are_valid_and_unknown_fields_are_not() -> None:
    whole = document()
    num_checked = 0
    for asked in corpus():
        if asked.verdict != "refused":
            place, body = body_of(asked.place, {**asked.plain, asked.field: asked.good})
            operation = whole["paths"][PATHS[place]]["post"]
            schema = {**operation["requestBody"]["content"]["application/json"]["schema"], **whole}
            jsonschema.validate(body, schema)
            assert not jsonschema.Draft202012Validator(schema).is_valid({**body, "max_token": 3})
            num_checked += 1
    assert num_checked > 150


def test_a_field_is_described_by_its_line_of_the_table() -> None:
    schemas = document()["components"]["schemas"]
    assert schemas["ChatBody"]["properties"]["n"]["description"] == "honoured: 1 to 8"
    assert schemas["MessagesBody"]["properties"]["speed"]["description"] == "harmless: one box, one speed"
    assert "functions" not in schemas["ChatBody"]["properties"], "what is refused is not offered"
