"""What the bodies of chat and text completions ask for, in our own words.

Which fields there are and what becomes of each is in `request_fields`, the types of those honoured in `openai_bodies`.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from kvasir.gateway.edges.cache_intent import hint_of
from kvasir.gateway.edges.chat_turns import NamedTool, Turn, message_of
from kvasir.gateway.edges.field_check import FieldCheck, decode_body
from kvasir.gateway.edges.grammar_fields import AskedGrammar, read_grammar
from kvasir.gateway.edges.openai_bodies import MAX_TURNS, Body, ChatBody, CompletionBody, StreamOptions
from kvasir.gateway.text.json_input import read_by, read_json
from kvasir.protocol.client_messages import ChatOptions, CompletionRequest
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import CacheHint, Priority, SamplingOptions
from kvasir.protocol.tokens import pack_tokens

MAX_CHOICES = 8
MAX_PROMPTS = 256  # times choices


class Asked(Struct, frozen=True):
    """What one HTTP request asks for: a request per prompt and choice, prompt by prompt.

    `shown`: what the answer repeats of it. `may_close`: a header may say that its conversation ends. `names`: of the
    request's fields, by what they are called in `CompletionRequest`, where that differs. `previous`: the id of the
    answer that it is to be compared with, empty: of none yet; None: it is not to be compared.
    """

    requests: list[CompletionRequest]
    num_choices: int
    stream: bool
    wants_usage: bool
    echo: bool = False
    wants_token_ids: bool = False
    shown: dict[str, Any] = {}
    may_close: bool = False
    names: dict[str, str] = {}
    previous: str | None = None

    def renamed(self, error: BadRequest) -> BadRequest:
        """Return `error` in the words of the request."""
        ours = error.param
        if ours in self.names:
            error.param = self.names[ours]
            if ours != "grammar":
                error.message = re.sub(rf"\b{ours}\b", error.param, error.message)
            elif error.param not in error.message:  # a grammar's own words
                error.message = f"{error.param}: {error.message}"
        return error


def read_chat(raw: bytes) -> Asked:
    """Read the body of a chat completion. Takes long for a large one: call it in a thread then.

    Raises:
        BadRequest: no valid JSON, out of range, unknown or not supported; `param` names the field.
    """
    body: ChatBody = decode_body(_CHAT, _chat_body, raw, _check_turns)
    hint = hint_of(body.prompt_cache_options, body.prompt_cache_retention, has_breakpoint=_has_breakpoint(body))
    asked = asked_of_chat(body, hint)
    if body.max_completion_tokens is not None:
        asked.names["max_tokens"] = "max_completion_tokens"
    return asked


def asked_of_chat(
    body: ChatBody, hint: CacheHint | None = None, structured: AskedGrammar | None = None, *, is_lenient: bool = False
) -> Asked:
    """Return what the body of a chat asks for. `hint`: in others' words, ours wins; `structured`: by a field that chat
    completions do not have; `is_lenient`: see `ChatOptions`.

    Raises:
        BadRequest: something is out of range; `param` names the field.
    """
    messages = [message_of(turn, index) for index, turn in enumerate(body.messages)]
    num_logprobs = None
    if body.logprobs:
        num_logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = _chat_options(body, is_lenient)
    return _asked(body, num_logprobs, [{"messages": messages, "chat": options}], max_tokens, hint, structured)


def read_completion(raw: bytes) -> Asked:
    """Read the body of a text completion, as `read_chat` does.

    Raises:
        BadRequest: as `read_chat`.
    """
    body: CompletionBody = decode_body(_COMPLETION, _completion_body, raw, _check_options)
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise BadRequest("best_of above n is not supported; ask for n and choose yourself", param="best_of")
    if body.echo and body.logprobs is not None:
        raise BadRequest("echo with logprobs is not supported: prompts have no log probabilities here", param="echo")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this route
    return _asked(body, body.logprobs, _prompts(body.prompt), max_tokens)


def _has_breakpoint(body: ChatBody) -> bool:
    if body.cache_control is not None:
        return True
    for turn in body.messages:
        if turn.content is not None and not isinstance(turn.content, str):
            for part in turn.content:
                if part.cache_control is not None or part.prompt_cache_breakpoint is not None:
                    return True
    return False


def _chat_options(body: ChatBody, is_lenient: bool) -> ChatOptions:
    """Return how the template is to be used."""
    choice, is_continued = body.tool_choice, bool(body.continue_final_message)
    has_cue = body.add_generation_prompt
    return ChatOptions(
        tools=_object(body.tools),
        tool_choice="required" if isinstance(choice, NamedTool) else choice or "auto",
        tool_name=choice.function.name[:256] if isinstance(choice, NamedTool) else "",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        separate_reasoning=body.separate_reasoning is not False,
        include_reasoning=body.include_reasoning is not False,
        max_reasoning_tokens=(
            body.thinking_token_budget if body.max_reasoning_tokens is None else body.max_reasoning_tokens
        ),
        documents=_object(body.documents),
        variables=_variables(body),
        reasoning_effort=body.reasoning_effort or "",
        is_lenient=is_lenient,
        add_generation_prompt=bool(has_cue) if is_continued else has_cue is not False,
        continue_final_message=is_continued,
    )


def _variables(body: ChatBody) -> bytes:
    raw = _object(body.chat_template_kwargs)
    if body.enable_thinking is None:
        return raw
    given = read_json(raw or b"{}", dict[str, Raw], "chat_template_kwargs")
    return msgspec.json.encode({"enable_thinking": body.enable_thinking, **given})


def _object(raw: Raw) -> bytes:
    """Return JSON that is read later, nothing for what says nothing."""
    found = bytes(raw)
    return b"" if found in (b"null", b"{}", b"[]") else found


_SAMPLING = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
_CHAT, _COMPLETION = FieldCheck("chat"), FieldCheck("completions")
_TURN, _OPTIONS = FieldCheck("message"), FieldCheck("stream_options")
_turns = "messages", Annotated[list[_TURN.with_harmless(Turn)], Meta(max_length=MAX_TURNS)]  # type: ignore[misc]
_options = "stream_options", _OPTIONS.with_harmless(StreamOptions) | None, None
CHAT_TYPE: type = _CHAT.with_harmless(ChatBody, _turns, _options)
COMPLETION_TYPE: type = _COMPLETION.with_harmless(CompletionBody, _options)
_chat_body: msgspec.json.Decoder[Any] = msgspec.json.Decoder(CHAT_TYPE)
_completion_body: msgspec.json.Decoder[Any] = msgspec.json.Decoder(COMPLETION_TYPE)


def _check_turns(kept: dict[str, Any]) -> None:
    if "messages" in kept and bytes(kept["messages"]).startswith(b"["):
        turns = msgspec.json.decode(kept["messages"], type=list[Raw])
        if len(turns) <= MAX_TURNS:  # more are refused for their number
            kept["messages"] = [_TURN.honoured_of(turn, f"messages[{index}].") for index, turn in enumerate(turns)]
    _check_options(kept)


def _check_options(kept: dict[str, Any]) -> None:
    options = kept.get("stream_options")
    if options is not None and bytes(options) != b"null":
        kept["stream_options"] = _OPTIONS.honoured_of(options, "stream_options.")


def _asked(
    body: Body,
    num_logprobs: int | None,
    prompts: list[dict[str, Any]],
    max_tokens: int | None,
    hint: CacheHint | None = None,
    structured: AskedGrammar | None = None,
) -> Asked:
    num_choices = 1 if body.n is None else body.n
    if not 1 <= num_choices <= MAX_CHOICES:
        raise BadRequest(f"n must be between 1 and {MAX_CHOICES}, not {num_choices}", param="n")
    if len(prompts) * num_choices > MAX_PROMPTS:
        raise BadRequest(
            f"{len(prompts)} prompts of {num_choices} choices are more than the {MAX_PROMPTS} that fit one request",
            param="prompt",
        )
    if body.cache_salt == "":
        raise BadRequest("cache_salt is empty; leave it out to share the tenant's cache", param="cache_salt")
    sampling = _sampling(body, num_logprobs)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stop_token_ids = body.stop_token_ids or []
    structured = structured or read_grammar(body)
    if len(stop_token_ids) > 256:
        raise BadRequest("stop_token_ids takes up to 256 ids", param="stop_token_ids")
    requests = [
        CompletionRequest(
            id=0,
            api_key="",
            model=body.model,
            max_tokens=max_tokens,
            # Each choice of each prompt draws from a seed of its own, the first from the one that was given.
            sampling=sampling if number == 0 else msgspec.structs.replace(sampling, seed=_mix(sampling.seed, number)),
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(body.ignore_eos),
            deadline_s=body.deadline_s,
            cache_hint=body.cache_hint or hint,
            retention=body.retention or [],
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            cache_salt=body.cache_salt or "",
            priority=_priority(body.priority),
            no_store=bool(body.no_store),
            grammar=None if structured is None else structured.grammar,
            **prompts[number // num_choices],
        )
        for number in range(len(prompts) * num_choices)
    ]
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    return Asked(
        requests,
        num_choices,
        bool(body.stream),
        wants_usage,
        bool(body.echo),
        bool(body.return_token_ids),
        may_close=body.cache_hint is None and hint != "one_shot",
        names={"grammar": "tools" if structured is None else structured.field},
    )


def _priority(given: Priority | int | None) -> Priority | None:
    """Return the class that a request asks for, if any. As a number it is vLLM's: the lower, the sooner."""
    if given is None or isinstance(given, str):
        return given
    return "high" if given < 0 else "low" if given else "normal"


def _sampling(body: Body, num_logprobs: int | None) -> SamplingOptions:
    given: dict[str, Any] = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:  # vLLM's way to say off
        given["top_k"] = 0
    given["seed"] = secrets.randbits(62) if body.seed is None else body.seed & ((1 << 63) - 1)
    if body.logit_bias:
        given["logit_bias"] = body.logit_bias
    if num_logprobs is not None:
        given["logprobs"] = num_logprobs
    if body.min_tokens:
        given["min_tokens"] = body.min_tokens
    if body.allowed_token_ids is not None:
        if not body.allowed_token_ids:
            raise BadRequest("allowed_token_ids is empty; leave it out to allow all", param="allowed_token_ids")
        given["allowed_token_ids"] = body.allowed_token_ids
    if body.bad_words:
        given["bad_words"] = body.bad_words
    try:
        options: SamplingOptions = read_by(
            lambda: msgspec.convert(given, SamplingOptions, strict=False), SamplingOptions
        )
    except BadRequest as error:
        error.param = (error.param or "").partition("[")[0] or None  # the field, not a place in it
        raise
    return options


def _prompts(raw: Raw) -> list[dict[str, Any]]:
    """Return the prompts as `CompletionRequest` takes them. Their kind is known before they are decoded: a list of
    millions of lists would take a second."""
    shape = re.match(rb"\[\s*([\[\"]?)", raw)
    if shape is None:
        return [{"text": _decode_prompt(raw, str)}]
    if shape[1] == b"[" and bytes(raw).count(b"[") > MAX_PROMPTS + 1 and b'"' not in bytes(raw):
        raise BadRequest(f"up to {MAX_PROMPTS} prompts fit one request", param="prompt")
    if shape[1] == b'"':
        prompts = [{"text": text} for text in _decode_prompt(raw, list[str])]
    elif shape[1] == b"[":
        prompts = [{"token_ids": _pack(ids)} for ids in _decode_prompt(raw, list[list[int]])]
    else:
        ids = _decode_prompt(raw, list[int])
        prompts = [{"token_ids": _pack(ids)}] if ids else []
    if not prompts:
        raise BadRequest("prompt is empty; send a string or token ids", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise BadRequest(f"up to {MAX_PROMPTS} prompts fit one request, not {len(prompts)}", param="prompt")
    return prompts


def _decode_prompt(raw: Raw, kind: Any) -> Any:
    try:
        return read_json(raw, kind, "prompt")
    except BadRequest as error:
        message = f"{error.message}; send a string, token ids, or several of one kind"
        raise BadRequest(message, param="prompt") from None


def _pack(token_ids: list[int]) -> bytes:
    try:
        return pack_tokens(token_ids)
    except (OverflowError, TypeError):
        raise BadRequest("prompt holds something that is no token id", param="prompt") from None


def _mix(seed: int, choice: int) -> int:
    return (seed + choice * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
