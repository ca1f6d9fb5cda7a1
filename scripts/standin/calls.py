"""What a request to vLLM may say, and how it is refused: bodies of both token routes to `Call`s, errors as recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from scripts.standin.engine import EngineOptions, Sampling

MAX_LOGPROBS = 20


class WireError(Exception):
    """An answer that is an error. `in_stream`: found only after a stream's head has gone out with status 200."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "BadRequestError",
        param: str | None = None,
        *,
        in_stream: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.in_stream = in_stream
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def engine_is_dead() -> WireError:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return WireError(500, message, "InternalServerError", in_stream=True)


def queue_is_full() -> WireError:
    message = "The engine is currently busy and cannot accept new requests. Please try again later or on a different"
    return WireError(503, f"{message} instance.", "Service Unavailable", in_stream=True)


def scale_out_is_off() -> WireError:
    message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
    return WireError(403, message, "PermissionDeniedError")


@dataclass(frozen=True, slots=True)
class Call:
    """A request for tokens, on either route."""

    token_ids: list[int]
    sampling: Sampling
    is_stream: bool
    wants_usage: bool
    wants_continuous_usage: bool
    returns_token_ids: bool
    salt: str | None
    request_id: str | None


def read_generate(body: dict[str, Any], model: str, options: EngineOptions) -> Call:
    """Check a body of `/inference/v1/generate` as vLLM does, known fields only: others are silently ignored.

    Raises:
        WireError: what vLLM would answer.
    """
    _check_model(body, model)
    token_ids = body.get("token_ids")
    if not isinstance(token_ids, list) or not token_ids:
        kind = "missing" if token_ids is None else "too_short" if token_ids == [] else "list_type"
        raise _invalid("body.token_ids", kind)
    if any(token_id < 0 for token_id in token_ids):
        raise _invalid("body.token_ids", "value_error")
    parameters = body.get("sampling_params")
    if not isinstance(parameters, dict):
        raise _invalid("body.sampling_params", "missing" if parameters is None else "is_instance_of")
    return _read_call(body, parameters, token_ids, options)


def read_completion(body: dict[str, Any], model: str, options: EngineOptions) -> Call:
    """Check a body of `/v1/completions`. A prompt that is text has one token per word: there is no tokenizer here.

    Raises:
        WireError: what vLLM would answer.
    """
    _check_model(body, model)
    token_ids = body.get("prompt")
    if isinstance(token_ids, str):
        token_ids = [crc32(word.encode()) % options.vocab_size for word in token_ids.split()]
    if not isinstance(token_ids, list) or not token_ids or not all(isinstance(each, int) for each in token_ids):
        raise _invalid("body.prompt", "list_type")
    if len(token_ids) >= options.max_model_len:
        message = (
            f"This model's maximum context length is {options.max_model_len} tokens. However, your prompt contains "
            f"{len(token_ids)} input tokens, which exceeds this limit even without any output tokens. Please reduce "
            f"the length of the input prompt. (parameter=input_tokens, value={len(token_ids)})"
        )
        raise WireError(400, message, param="input_tokens")
    return _read_call(body, {"max_tokens": 16, **body}, token_ids, options)


def _read_call(body: dict[str, Any], parameters: dict[str, Any], token_ids: list[int], options: EngineOptions) -> Call:
    room = max(1, options.max_model_len - len(token_ids))
    max_tokens = parameters.get("max_tokens")
    if max_tokens is not None and type(max_tokens) is not int:
        raise _invalid("body.sampling_params", "is_instance_of")
    temperature, top_p = float(parameters.get("temperature", 1.0)), float(parameters.get("top_p", 1.0))
    for name, value, is_good, rule in (
        ("temperature", temperature, temperature >= 0, "must be non-negative"),
        ("top_p", top_p, 0 < top_p <= 1, "must be in (0, 1]"),
        ("max_tokens", max_tokens, max_tokens is None or max_tokens >= 1, "must be at least 1"),
    ):
        if not is_good:
            raise WireError(400, f"{name} {rule}, got {value}. (parameter={name}, value={value})", param=name)
    if parameters.get("n", 1) > 1 and temperature == 0:
        raise WireError(400, f"n must be 1 when using greedy sampling, got {parameters['n']}.")
    if parameters.get("n", 1) != 1:
        raise WireError(400, "the stand-in knows n = 1 only")
    salt = body.get("cache_salt")
    if salt == "":
        message = "Parameter 'cache_salt' must be a non-empty string if provided. (parameter=cache_salt)"
        raise WireError(400, message, param="cache_salt")
    sampling = Sampling(
        max_tokens=min(room, max_tokens or room),
        temperature=temperature,
        seed=parameters.get("seed") or 0,
        ignore_eos=bool(parameters.get("ignore_eos")),
        stop_token_ids=frozenset(parameters.get("stop_token_ids") or ()),
        min_tokens=parameters.get("min_tokens") or 0,
        presence_penalty=parameters.get("presence_penalty") or 0.0,
        frequency_penalty=parameters.get("frequency_penalty") or 0.0,
        logprobs=parameters.get("logprobs"),
        forced=_read_grammar(parameters.get("structured_outputs"), options),
    )
    stream_options = body.get("stream_options") or {}
    wants_usage = bool(stream_options.get("include_usage"))
    return Call(
        token_ids=token_ids,
        sampling=sampling,
        is_stream=bool(body.get("stream")),
        wants_usage=wants_usage,
        wants_continuous_usage=wants_usage and bool(stream_options.get("continuous_usage_stats")),
        returns_token_ids=bool(body.get("return_token_ids")),
        salt=salt,
        request_id=body.get("request_id"),
    )


def _read_grammar(asked: dict[str, Any] | None, options: EngineOptions) -> tuple[int, ...]:
    """Return the tokens that a grammar names by their ids; the stand-in draws these first, and knows no more of it."""
    if asked is None:
        return ()
    if not options.holds_grammars:
        raise WireError(400, "Invalid grammar specification.")
    return tuple(int(token_id) for token_id in re.findall(r"<\[(\d+)\]>", asked["grammar"]))


def check_for_engine(call: Call, options: EngineOptions) -> None:
    """The checks that vLLM makes only once a stream has begun.

    Raises:
        WireError: with `in_stream` set.
    """
    length, limit = len(call.token_ids), options.max_model_len
    advice = "Make sure that `max_model_len` is no smaller than the number of text tokens"
    if length > limit:
        message = f"The decoder prompt (length {length}) is longer than the maximum model length of {limit}. {advice}."
        raise WireError(400, message, in_stream=True)
    if length == limit:
        message = (
            f"The decoder prompt (length {length}) plus the number of requested output tokens (at least 1) is longer "
            f"than the maximum model length of {limit}. {advice} (prompt + requested output tokens)."
        )
        raise WireError(400, message, in_stream=True)
    largest = max(call.token_ids)
    if largest >= options.vocab_size:
        raise WireError(400, f"Token id {largest} is out of vocabulary", in_stream=True)
    count = call.sampling.logprobs
    if count is not None and count > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {count}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise WireError(400, f"{message} (parameter=logprobs, value={count})", param="logprobs", in_stream=True)


def _check_model(body: dict[str, Any], model: str) -> None:
    asked = body.get("model")
    if asked is not None and asked != model:
        message = f"The model `{asked}` does not exist. Valid aliases: {model}."
        raise WireError(404, message, "NotFoundError", "model")


def _invalid(where: str, kind: str) -> WireError:
    return WireError(400, f"1 validation error:\n  {{'type': '{kind}', 'loc': '{where}'}}", "Bad Request", where)
