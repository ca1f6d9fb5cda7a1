"""What clients already say about caching, in the words of other APIs, as a cache hint of ours.

Times are not kept: in replays of traces a time to live was worth nothing, and the one bit that nothing follows was
worth nearly everything (`cache_hint` `closing` or `one_shot`). So what says that becomes a hint; all else is `open`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import CacheHint


class PromptCacheOptions(Struct):
    """OpenAI's: with mode `explicit` only what ends at a breakpoint is cached. `comparison_response_id`, of responses
    only: say what changed since that one."""

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: str | None = None
    comparison_response_id: str | None = None


class CacheControl(Struct):
    """Anthropic's."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


Retention = Literal["in_memory", "in-memory", "24h"]


def hint_of(
    options: PromptCacheOptions | None, retention: Retention | None, *, has_breakpoint: bool
) -> CacheHint | None:
    """Return the hint in a request's body; None where it says nothing.

    Raises:
        BadRequest: two fields say how long something is to be kept.
    """
    if options is not None and options.ttl is not None and retention is not None:
        raise BadRequest(
            "give either prompt_cache_options.ttl or prompt_cache_retention", param="prompt_cache_retention"
        )
    if options is not None and options.mode == "explicit" and not has_breakpoint:
        return "one_shot"
    return (
        "open" if has_breakpoint or retention is not None or (options is not None and options.ttl is not None) else None
    )


def says_no_store(headers: Mapping[str, str]) -> bool:
    """Return whether the headers of a request ask that nothing of it be kept (RFC 9111, 5.2.1.5)."""
    return "no-store" in [each.strip().lower() for each in headers.get("cache-control", "").split(",")]


def says_final(headers: Mapping[str, str]) -> bool:
    """Return whether the headers of a request say that its conversation ends with it."""
    return headers.get("x-dynamo-session-final", "").strip().lower() in ("true", "1")
