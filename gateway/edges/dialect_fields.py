"""The rows of the table of request fields for `/v1/responses` and `/v1/messages`, see `openai_fields`."""

from __future__ import annotations

from typing import Any

from kvasir.gateway.edges.openai_fields import Place, Row

_EMPTY: tuple[Any, ...] = (False, 0, "", [], {})
_BOTH: tuple[Place, ...] = ("responses", "anthropic")
_RESPONSES: tuple[Place, ...] = ("responses",)
_ANTHROPIC: tuple[Place, ...] = ("anthropic",)
_KEEP_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

DIALECT_FIELDS: tuple[Row, ...] = (
    Row("model stream temperature top_p", _BOTH, "honoured", "as for chats"),
    Row("top_k min_p repetition_penalty seed ignore_eos deadline_s", _BOTH, "honoured", "as for chats"),
    Row("cache_hint retention no_store cache_salt priority", _BOTH, "honoured", "as for chats"),
    Row("input", _RESPONSES, "honoured", "a text, or messages, reasoning, function calls and their outputs; text only"),
    Row("instructions", _RESPONSES, "honoured", "a system message before the input"),
    Row("max_output_tokens", _RESPONSES, "honoured", "no more than the window allows, which is the default"),
    Row("messages system", _ANTHROPIC, "honoured", "text, thinking, uses of tools and their results"),
    Row("max_tokens", _ANTHROPIC, "honoured", "required, but to count tokens; no more than the window allows"),
    Row("stop_sequences", _ANTHROPIC, "honoured", "up to 16 strings; not part of the answer"),
    Row("tools tool_choice", _BOTH, "honoured", "functions of the client's own, as for chats"),
    Row("parallel_tool_calls", _RESPONSES, "honoured", "false: the answer ends after one call"),
    Row("reasoning", _RESPONSES, "honoured", "`effort`, if the model's template knows it; no summaries are made"),
    Row(
        "thinking output_config",
        _ANTHROPIC,
        "honoured",
        "type, `budget_tokens` and `effort`, if the model knows them; `format`",
    ),
    Row("chat_template_kwargs max_reasoning_tokens enable_thinking", _RESPONSES, "honoured", "as for chats"),
    Row("prompt_cache_options prompt_cache_retention", _RESPONSES, "honoured", "as a `cache_hint`, see below"),
    Row("cache_control", _ANTHROPIC, "honoured", "here and on blocks: as a `cache_hint`, see below"),
    Row("metadata service_tier", _BOTH, "harmless", "nothing is stored; one tier"),
    Row("user safety_identifier store stream_options", _RESPONSES, "harmless", "nothing is stored or padded"),
    Row("max_tool_calls", _RESPONSES, "harmless", "bounds tools of the server's own, of which there are none"),
    Row("prompt_cache_key", _RESPONSES, "harmless", "prefixes are found without it"),
    Row("speed inference_geo user_profile_id workspace_id betas", _ANTHROPIC, "harmless", "one box, one speed"),
    Row(
        "previous_response_id conversation background prompt",
        _RESPONSES,
        "refused",
        "nothing is stored: send all items",
    ),
    Row("background_options access_programs image moderation", _RESPONSES, "refused", "there is no such service here"),
    Row(
        "include",
        _RESPONSES,
        "refused",
        "an answer has no more than its items",
        (*_EMPTY, ["reasoning.encrypted_content"]),
    ),
    Row("truncation", _RESPONSES, "refused", "a prompt that is too long is refused", (*_EMPTY, "disabled")),
    Row("text", _RESPONSES, "honoured", "its `format`, see below"),
    Row("top_logprobs", _RESPONSES, "refused", "items have no log probabilities here"),
    Row(
        "context_management", _BOTH, "refused", "the context is what is sent", (*_EMPTY, {"edits": []}, _KEEP_THINKING)
    ),
    Row("diagnostics", _ANTHROPIC, "honoured", "`previous_message_id`: what changed since that request"),
    Row("container mcp_servers", _ANTHROPIC, "refused", "there is no such service here"),
)
