"""The shapes of vLLM's answers on both token routes, as recorded from 0.32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from scripts.standin.calls import Call, WireError

VERSION = "0.32.0"
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error_event(error: WireError) -> bytes:
    return f"data: {json.dumps(error.content)}\n\n".encode()


def usage_of(call: Call, num_drawn: int, num_cached: int | None = None) -> dict[str, Any]:
    """Usage as final chunks have it: nothing that is null. `num_cached` None where the server does not tell it."""
    num_prompt = len(call.token_ids)
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_drawn,
        "completion_tokens": num_drawn,
    }
    if num_cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return usage


def _whole_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Usage as answers without stream have it, nulls and all."""
    details = usage.get("prompt_tokens_details")
    if details is not None:
        details = {**details, "created_cache_tokens": None, "multimodal_tokens": None}
    return {**usage, "prompt_tokens_details": details, "completion_tokens_details": None}


def _alternatives(token_id: int, count: int, vocab_size: int) -> list[tuple[int, float]]:
    return [((token_id + i * 7) % vocab_size, -0.5 - 1.25 * i) for i in range(max(1, count))]


class GenerateWire:
    """The shapes of `/inference/v1/generate`."""

    id_prefix = "generate-tokens-"
    engine_suffix = ""

    def __init__(self, call: Call, request_id: str, model: str, created: int, vocab_size: int) -> None:
        self._call = call
        self._id = request_id
        self._model = model
        self._created = created
        self._vocab_size = vocab_size
        self._num_drawn = 0

    def chunk(self, token_ids: Sequence[int], finish_reason: str | None, stop_reason: int | None) -> bytes:
        first = self._num_drawn == 0
        self._num_drawn += len(token_ids)
        usage = None
        if self._call.wants_continuous_usage:
            usage = {**usage_of(self._call, self._num_drawn), "prompt_tokens_details": None}
            usage["completion_tokens_details"] = None
        content: dict[str, Any] = {"request_id": self._id, "usage": usage}
        if first and self._call.returns_token_ids:
            content["prompt_token_ids"] = self._call.token_ids
        content["output_mode"] = "tokens"
        content["choices"] = [self._choice(token_ids, finish_reason, stop_reason)]
        return event(content)

    def last_chunk(self, usage: dict[str, Any] | None) -> bytes:
        if usage is None:
            return b""
        return event({"request_id": self._id, "usage": usage, "output_mode": "tokens", "choices": []})

    def answer(
        self, token_ids: Sequence[int], finish_reason: str, stop_reason: int | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        self._num_drawn = len(token_ids)
        return {
            "request_id": self._id,
            "model": self._model,
            "created": self._created,
            "usage": _whole_usage(usage),
            "prompt_logprobs": None,
            "prompt_token_id_logprobs": None,
            "prompt_token_ids": self._call.token_ids if self._call.returns_token_ids else None,
            "mm_placeholders": None,
            "metrics": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "output_mode": "tokens",
            "choices": [self._choice(token_ids, finish_reason, stop_reason)],
        }

    def _choice(self, token_ids: Sequence[int], finish_reason: str | None, stop_reason: int | None) -> dict[str, Any]:
        spans = None
        if finish_reason is not None:
            spans = [{"version": "default", "start": 0, "end": self._num_drawn}] if self._num_drawn else []
        logprobs = None
        if self._call.sampling.logprobs is not None:
            logprobs = {"content": [self._logprob(token_id) for token_id in token_ids]}
        return {
            "index": 0,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "token_ids": token_ids,
            "routed_experts": None,
            "sampling_mask": None,
            "weight_versions": spans,
            "logprobs": logprobs,
        }

    def _logprob(self, token_id: int) -> dict[str, Any]:
        listed = _alternatives(token_id, self._call.sampling.logprobs or 0, self._vocab_size)
        top = [{"token_id": each, "logprob": value, "rank": i + 1} for i, (each, value) in enumerate(listed)]
        return {**top[0], "top_logprobs": top}


class CompletionWire:
    """The shapes of `/v1/completions`. Text is made up: the ids are what counts."""

    id_prefix = "cmpl-"
    engine_suffix = "-0"  # by which name the engine knows the request, and by which it can be aborted

    def __init__(self, call: Call, request_id: str, model: str, created: int, vocab_size: int) -> None:
        self._call = call
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": model}
        self._fingerprint = {"system_fingerprint": f"vllm-{VERSION}-standin"}
        self._vocab_size = vocab_size
        self._num_drawn = 0
        self._num_characters = 0

    def chunk(self, token_ids: Sequence[int], finish_reason: str | None, stop_reason: int | None) -> bytes:
        first = self._num_drawn == 0
        self._num_drawn += len(token_ids)
        logprobs = self._logprobs(token_ids)
        text = self._text(token_ids, finish_reason)
        self._num_characters += len(text)
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self._call.returns_token_ids:
            choice["prompt_token_ids"] = self._call.token_ids if first else None
            choice["token_ids"] = token_ids
        content = {**self._head, "choices": [choice]}
        if self._call.wants_continuous_usage:
            content["usage"] = usage_of(self._call, self._num_drawn)
        if finish_reason is not None and not self._call.wants_usage:
            content |= self._fingerprint
        return event(content)

    def last_chunk(self, usage: dict[str, Any] | None) -> bytes:
        return b"" if usage is None else event({**self._head, "choices": [], "usage": usage} | self._fingerprint)

    def answer(
        self, token_ids: Sequence[int], finish_reason: str, stop_reason: int | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        returns = self._call.returns_token_ids
        choice = {
            "index": 0,
            "text": self._text(token_ids, finish_reason),
            "logprobs": self._logprobs(token_ids),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "token_ids": token_ids if returns else None,
            "prompt_logprobs": None,
            "prompt_token_ids": self._call.token_ids if returns else None,
            "routed_experts": None,
        }
        rest = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        content = {**self._head, "choices": [choice], "service_tier": None} | self._fingerprint
        return {**content, "usage": _whole_usage(usage), **rest}

    def _text(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        shown = token_ids[:-1] if finish_reason == "stop" else token_ids
        return "".join(f" t{token_id}" for token_id in shown)

    def _logprobs(self, token_ids: Sequence[int]) -> dict[str, Any] | None:
        count = self._call.sampling.logprobs
        if count is None:
            return None
        listed = [_alternatives(token_id, count, self._vocab_size) for token_id in token_ids]
        offsets = [self._num_characters + len(self._text(token_ids[:i], None)) for i in range(len(token_ids))]
        return {
            "text_offset": offsets,
            "token_logprobs": [top[0][1] for top in listed],
            "tokens": [f" t{token_id}" for token_id in token_ids],
            "top_logprobs": [{f" t{each}": value for each, value in top} for top in listed],
        }
