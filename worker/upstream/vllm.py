"""vLLM's wire: what to ask, how to read the answers. No I/O.

Seen on 0.32. Tokens go in and out by `/inference/v1/generate`, which a server offers when it was started with
`--enable-scale-out`; elsewhere by `/v1/completions` with `return_token_ids`, which tells no ids of alternatives: there
requests with logprobs are refused. What was cached is told only in the last chunk. Many errors come as events of
an answer of status 200.

Grammars go there in the notation of llguidance. Of vLLM's backends only `guidance` knows it, which `auto`, the default,
falls back to: xgrammar refuses the first line of such a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvasir.protocol.codec import MAX_TOKENS, TokenId
from kvasir.protocol.errors import BadRequest, ConfigurationError
from kvasir.protocol.lark import HEADER, lark_of
from kvasir.protocol.messages import Generate, TokenLogprobs
from kvasir.protocol.sampling import Constraint
from kvasir.protocol.tokens import num_tokens, unpack_tokens

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
ABORT = "/inference/v1/abort_requests"
QUEUE_FULL = 503
PROBED = (7, 3, 7)
DONE = b"[DONE]"
MAX_RANKS = 1024
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what decoding an answer may raise
_PASSED_ON = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")


def route(has_generate: bool) -> str:
    """Return the route by which token ids go in and out."""
    return GENERATE if has_generate else COMPLETIONS


class TopLogprob(msgspec.Struct, gc=False):
    token_id: TokenId
    logprob: float


class ChosenLogprob(msgspec.Struct, gc=False):
    logprob: float
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(msgspec.Struct, gc=False):
    content: list[ChosenLogprob] = []


class Choice(msgspec.Struct, gc=False):
    token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=4096)] | None = None
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Usage(msgspec.Struct, gc=False):
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class UpstreamError(msgspec.Struct, gc=False):
    message: str = ""
    code: int | str | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream. Fields that we do not read are passed over: every version adds some."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: UpstreamError | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        """What the last chunk tells, None in others. An answer without a token does not know it: it says 0 then."""
        usage = self.usage
        if usage is None or usage.prompt_tokens_details is None or not usage.completion_tokens:
            return None
        return usage.prompt_tokens_details.cached_tokens


CHUNKS = msgspec.json.Decoder(Chunk)


class _ModelCard(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _ModelCards(msgspec.Struct):
    data: list[_ModelCard] = []


class EventSource(msgspec.Struct, frozen=True):
    """Where one data-parallel rank publishes its block events, as the server tells it."""

    endpoint: str = ""
    replay_endpoint: str | None = None
    topic: str = ""
    enable_kv_cache_events: bool = True


class SchedulerLimits(msgspec.Struct, frozen=True):
    """What only a server in development mode tells."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class _VllmConfig(msgspec.Struct):
    scheduler_config: SchedulerLimits = SchedulerLimits()


class _ServerInfo(msgspec.Struct):
    vllm_config: _VllmConfig = msgspec.field(default_factory=_VllmConfig)


class ServedModel(msgspec.Struct, frozen=True):
    """A model as the server lists it. `lora`: its name if it is an adapter of another."""

    id: str
    root: str
    max_context: int
    lora: str | None = None


class Metrics(msgspec.Struct, frozen=True):
    """What we read of one rank's metrics. `progress` changes when the engine works, and only then."""

    started_at: str
    block_size: int
    num_blocks: int
    num_running: int
    num_waiting: int
    cache_usage: float
    progress: tuple[str, ...]


def read_models(body: bytes, wanted: str | None) -> ServedModel:
    """Return the model called `wanted`, or the only one that is no adapter.

    Raises:
        ConfigurationError: there is no such model, or several to choose from.
    """
    cards = {card.id: card for card in msgspec.json.decode(body, type=_ModelCards).data}
    names = [wanted] if wanted is not None else [card.id for card in cards.values() if card.parent is None]
    if len(names) != 1 or names[0] not in cards:
        listed = ", ".join(sorted(cards)) or "none"
        raise ConfigurationError(f"the upstream serves {listed}; name one of them with --upstream-model.")
    card = cards[names[0]]
    if card.max_model_len is None and card.parent in cards:
        card.max_model_len = cards[card.parent].max_model_len
    if card.max_model_len is None:
        raise ConfigurationError(f"the upstream does not tell max_model_len of {card.id!r}; is it a vLLM server?")
    lora = card.id if card.parent is not None else None
    return ServedModel(card.id, card.root or card.id, card.max_model_len, lora)


def read_event_sources(body: bytes) -> dict[int, EventSource]:
    """Return the event sources by data-parallel rank; none where events are off."""
    sources = msgspec.json.decode(body, type=dict[str, EventSource | None])
    return {
        int(rank): source
        for rank, source in sources.items()
        if rank.isdecimal() and source and source.enable_kv_cache_events
    }


def read_limits(body: bytes) -> SchedulerLimits:
    """Return the scheduler's limits out of /server_info."""
    return msgspec.json.decode(body, type=_ServerInfo).vllm_config.scheduler_config


_METRIC = re.compile(
    r"^(?:vllm:(cache_config_info|num_requests_running|num_requests_waiting|kv_cache_usage_perc|iteration_tokens_total_count"
    r"|prefix_cache_queries_total|generation_tokens_total|prompt_tokens_total)\{(.*)\}"
    r"|(process_start_time_seconds)) (\S+)$",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_ranks(text: str) -> list[int]:
    """Return the data-parallel ranks that a server's metrics speak of.

    Raises:
        ConfigurationError: more than a server can have.
    """
    engines = {dict(_LABEL.findall(found[2] or "")).get("engine", "0") for found in _METRIC.finditer(text) if found[1]}
    ranks = sorted(int(engine) for engine in engines if re.fullmatch("[0-9]{1,9}", engine)) or [0]
    if len(ranks) > MAX_RANKS:
        raise ConfigurationError(f"the upstream's /metrics tell of {len(ranks)} ranks; is it a vLLM server?")
    return ranks


def read_metrics(text: str, rank: int) -> Metrics:
    """Return what the metrics say of one rank.

    Raises:
        ConfigurationError: figures are missing that every vLLM server gives.
    """
    values: dict[str, str] = {}
    config: Mapping[str, str] = {}
    for found in _METRIC.finditer(text):
        if found[3]:
            values[found[3]] = found[4]
            continue
        labels = dict(_LABEL.findall(found[2]))
        if labels.get("engine", "0") != str(rank):
            continue
        values[found[1]] = found[4]
        if found[1] == "cache_config_info":
            config = labels
    try:
        return Metrics(
            started_at=values.get("process_start_time_seconds", ""),
            block_size=int(config["block_size"]),
            num_blocks=int(config["num_gpu_blocks"]) - 1,  # one of them is never given out
            num_running=_count(values["num_requests_running"]),
            num_waiting=_count(values["num_requests_waiting"]),
            cache_usage=max(0.0, min(1.0, float(values["kv_cache_usage_perc"]))),
            progress=tuple(value for name, value in sorted(values.items()) if name != "process_start_time_seconds"),
        )
    except (KeyError, ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"the upstream's /metrics do not tell {error} of rank {rank}; is it a vLLM server of 0.20 or later?"
        ) from None


def _count(text: str) -> int:
    return max(0, min(1 << 31, int(float(text))))


def generate_body(command: Generate, model: str, request_id: str, *, has_generate: bool, has_grammars: bool) -> bytes:
    """Return the body of the request that computes `command`.

    `cache_salt` is the namespace of the request's sharing scope: what one scope has cached is no other's hit.

    Raises:
        BadRequest: the server cannot draw in the way that is asked for.
    """
    sampling, constraint = command.sampling, command.sampling.constraint or Constraint()
    if sampling.logprobs is not None and not has_generate:
        raise BadRequest(f"logprobs need {GENERATE}; start the upstream with --enable-scale-out")
    reasoning, grammar = constraint.reasoning, constraint.grammar
    if constraint.bad_words or (reasoning is not None and (grammar is None or reasoning.max_tokens < MAX_TOKENS)):
        raise BadRequest("bad_words and max_reasoning_tokens are not supported by the engine of this model")
    if grammar is not None and not has_grammars:
        raise BadRequest("answers cannot be held to a grammar by the engine of this model")
    drawing: dict[str, Any] = {name: getattr(sampling, name) for name in _PASSED_ON}
    drawing |= {"max_tokens": command.max_tokens, "ignore_eos": command.ignore_eos}
    if sampling.top_k:
        drawing["top_k"] = sampling.top_k
    if sampling.logit_bias:
        drawing["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if constraint.min_tokens:
        num_delivered = num_tokens(command.token_ids) - command.num_prompt_tokens  # prompt, there
        drawing["min_tokens"] = max(0, constraint.min_tokens - num_delivered)
    if constraint.allowed_token_ids:
        drawing["allowed_token_ids"] = constraint.allowed_token_ids
    if grammar is not None:
        drawing["structured_outputs"] = {"grammar": lark_of(grammar, reasoning)}
    if command.stop_token_ids:
        drawing["stop_token_ids"] = command.stop_token_ids
    if sampling.logprobs is not None:
        drawing["logprobs"] = sampling.logprobs
    return _body(
        unpack_tokens(command.token_ids),
        drawing,
        has_generate=has_generate,
        model=model,
        request_id=request_id,
        stream=True,
        stream_options={"include_usage": True},
        cache_salt=command.namespace.hex(),
    )


def probe_body(model: str, *, has_generate: bool, has_grammar: bool = False) -> bytes:
    """Return the body of the smallest request: one token in, one out. With `has_grammar` the answer is the tokens
    `PROBED` if the server holds answers to grammars."""
    drawing: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    if has_grammar:
        grammar = HEADER + f"start: {' '.join(f'<[{token_id}]>' for token_id in PROBED)}"
        drawing |= {"max_tokens": len(PROBED), "structured_outputs": {"grammar": grammar}}
    return _body([0], drawing, has_generate=has_generate, model=model, stream=False)


def _body(token_ids: list[int], drawing: dict[str, Any], *, has_generate: bool, **more: Any) -> bytes:
    """Return the body of a request for `GENERATE`, or for `COMPLETIONS`."""
    if has_generate:
        more |= {"token_ids": token_ids, "sampling_params": {**drawing, "detokenize": False}, "output_mode": "tokens"}
    else:
        more |= {"prompt": token_ids, "return_token_ids": True, **drawing}
    return msgspec.json.encode(more)


def abort_body(request_id: str) -> bytes:
    """Return the body that stops one request of `GENERATE`, by the id under which the engine knows it."""
    return msgspec.json.encode({"request_ids": [f"generate-tokens-{request_id}"]})


def token_logprobs(choice: Choice, num_top: int) -> list[TokenLogprobs]:
    """Return the log probabilities of a chunk's tokens, with the `num_top` best alternatives of each."""
    if choice.logprobs is None:
        return []
    return [
        TokenLogprobs(entry.logprob, [(top.token_id, top.logprob) for top in entry.top_logprobs[:num_top]])
        for entry in choice.logprobs.content
    ]
