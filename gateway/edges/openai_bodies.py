"""The types of the fields that are honoured in the bodies of chat and text completions, see `request_fields`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from kvasir.gateway.edges.cache_intent import CacheControl, PromptCacheOptions, Retention
from kvasir.gateway.edges.chat_turns import NamedTool, Turn
from kvasir.protocol.codec import MAX_TOKENS
from kvasir.protocol.sampling import CacheHint, Priority, RetentionHint

MAX_TURNS = 4096
NumTokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class CommonBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What the bodies of all routes share."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    deadline_s: float | None = None
    cache_hint: CacheHint | None = None
    retention: Annotated[list[RetentionHint], Meta(max_length=16)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    priority: Priority | int | None = None
    no_store: bool | None = None

    def common(self) -> dict[str, Any]:
        """Return these fields by name."""
        return {name: getattr(self, name) for name in CommonBody.__struct_fields__}


class Body(CommonBody, kw_only=True):
    """What chat and text completions share."""

    max_tokens: int | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | StopStrings | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None
    response_format: Raw = Raw()
    structured_outputs: Raw = Raw()
    guided_json: Raw = Raw()
    guided_regex: Raw = Raw()
    guided_choice: Raw = Raw()
    guided_grammar: Raw = Raw()
    guided_json_object: Raw = Raw()


class ChatBody(Body, kw_only=True):
    messages: Annotated[list[Turn], Meta(max_length=MAX_TURNS)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    chat_template_kwargs: Raw = Raw()
    documents: Raw = Raw()
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Raw = Raw()
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    max_reasoning_tokens: NumTokens | None = None
    thinking_token_budget: NumTokens | None = None
    enable_thinking: bool | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Retention | None = None
    cache_control: CacheControl | None = None


class CompletionBody(Body, kw_only=True):
    prompt: Raw  # by its shape, see `_prompts`
    logprobs: NumLogprobs | None = None
    best_of: int | None = None
