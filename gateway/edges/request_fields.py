"""The one table of the HTTP routes' request fields: what is honoured, what is harmless, what is refused and why.

Requests are read by it (`field_check`). docs/api.md shows the same rows; a test compares them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Place = Literal["chat", "completions", "message", "stream_options", "responses", "anthropic"]
Verdict = Literal["honoured", "harmless", "refused"]
_EMPTY: tuple[Any, ...] = (False, 0, "", [], {})


class Row(NamedTuple):
    """Fields that are treated alike at `places`. `off`: values of a refused field that change nothing, beside null."""

    names: str
    places: tuple[Place, ...]
    verdict: Verdict
    note: str
    off: tuple[Any, ...] = _EMPTY


_BOTH: tuple[Place, ...] = ("chat", "completions")
_CHAT: tuple[Place, ...] = ("chat",)
_TEXT: tuple[Place, ...] = ("completions",)
_MESSAGE: tuple[Place, ...] = ("message",)
_DIALECTS: tuple[Place, ...] = ("responses", "anthropic")
_RESPONSES: tuple[Place, ...] = ("responses",)
_ANTHROPIC: tuple[Place, ...] = ("anthropic",)
_KEEP_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

FIELDS: tuple[Row, ...] = (
    Row("model", _BOTH, "honoured", "one that is served or an alias; may be left out by a tenant of one model"),
    Row("messages", _CHAT, "honoured", "text only; through the model's chat template"),
    Row("prompt", _TEXT, "honoured", "a text, token ids, or several of either, up to 256 choices in all"),
    Row("max_tokens", _BOTH, "honoured", "default: chat up to the window, completions 16"),
    Row("max_completion_tokens", _CHAT, "honoured", "wins over `max_tokens`"),
    Row("temperature top_p top_k min_p repetition_penalty", _BOTH, "honoured", "default: the model's own, see below"),
    Row("presence_penalty frequency_penalty", _BOTH, "honoured", "look at generated tokens"),
    Row("logit_bias", _BOTH, "honoured", "up to 1,024 token ids, -100 to 100"),
    Row("seed", _BOTH, "honoured", "each choice of each prompt draws by its own, derived from this one"),
    Row("n", _BOTH, "honoured", "1 to 8"),
    Row("stop", _BOTH, "honoured", "up to 16 strings; not part of the answer"),
    Row("stop_token_ids ignore_eos", _BOTH, "honoured", "vLLM's; up to 256 ids"),
    Row("include_stop_str_in_output", _BOTH, "honoured", "what stopped the answer is part of it, a stop token too"),
    Row("min_tokens", _BOTH, "honoured", "nothing ends the answer before, stop strings neither"),
    Row("allowed_token_ids", _BOTH, "honoured", "up to 8,192; only these are drawn"),
    Row("bad_words", _BOTH, "honoured", "up to 128; as they begin a text and after a space"),
    Row("skip_special_tokens", _BOTH, "honoured", "false: special tokens are part of the text"),
    Row("truncate_prompt_tokens", _BOTH, "honoured", "keeps the prompt's end; -1: as much as fits"),
    Row("return_token_ids", _BOTH, "honoured", "`token_ids` of choices, `prompt_token_ids`; as vLLM has them"),
    Row("echo", _TEXT, "honoured", "the prompt comes first; not with `logprobs`"),
    Row("echo", _CHAT, "honoured", "the assistant's last message comes first, see `continue_final_message`"),
    Row("add_generation_prompt", _CHAT, "honoured", "false: without the cue for the assistant's answer"),
    Row("continue_final_message", _CHAT, "honoured", "the answer goes on with the last message"),
    Row("chat_template_kwargs", _CHAT, "honoured", "variables of the model's template; others are refused"),
    Row("tools", _CHAT, "honoured", "functions; if the model's template knows them and its calls are known, see below"),
    Row("tool_choice", _CHAT, "honoured", "`required` and a function's name make the answer begin with a call"),
    Row("parallel_tool_calls", _CHAT, "honoured", "false: the answer ends after one call"),
    Row("include_reasoning separate_reasoning", _CHAT, "honoured", "false: left out; false: part of the content"),
    Row("max_reasoning_tokens thinking_token_budget", _CHAT, "honoured", "then the reasoning is ended"),
    Row("enable_thinking", _CHAT, "honoured", "a variable of the model's template, see `chat_template_kwargs`"),
    Row("documents", _CHAT, "honoured", "if the model's template knows them"),
    Row(
        "reasoning_effort",
        _CHAT,
        "honoured",
        "if the model's template knows it; `none` turns off thinking where that is a matter of on and off",
    ),
    Row("cache_salt", _BOTH, "honoured", "shares cached prefixes only with the tenant's requests of the same salt"),
    Row("response_format", _BOTH, "honoured", "`json_object` or `json_schema`, see below"),
    Row("structured_outputs", _BOTH, "honoured", "vLLM's; `json`, `regex`, `choice`, `grammar` or `json_object`"),
    Row(
        "guided_json guided_regex guided_choice guided_grammar guided_json_object",
        _BOTH,
        "honoured",
        "vLLM's older names for the same",
    ),
    Row("stream stream_options", _BOTH, "honoured", "server-sent events"),
    Row("logprobs top_logprobs", _CHAT, "honoured", "up to 20; of an answer that is not streamed 262,144 in all"),
    Row("logprobs", _TEXT, "honoured", "up to 20"),
    Row("best_of", _TEXT, "honoured", "up to `n`, where it chooses nothing"),
    Row("deadline_s", _BOTH, "honoured", "ours: the request ends with an error after so many seconds"),
    Row("cache_hint retention", _BOTH, "honoured", "ours: what to keep in the KV cache"),
    Row("no_store", _BOTH, "honoured", "ours: true leaves nothing in the KV cache; so does `cache-control: no-store`"),
    Row(
        "priority",
        _BOTH,
        "honoured",
        "`low`, `normal` or `high`, at most its key's; or vLLM's number: below 0 is high, above low",
    ),
    Row(
        "prompt_cache_options prompt_cache_retention cache_control",
        _CHAT,
        "honoured",
        "as a `cache_hint` where there is none, see below",
    ),
    Row("role content", _MESSAGE, "honoured", "`developer` is `system`; content is text or text parts"),
    Row("name", _MESSAGE, "honoured", "given to the chat template"),
    Row("tool_calls tool_call_id", _MESSAGE, "honoured", "given to the chat template; arguments as an object"),
    Row("reasoning_content reasoning", _MESSAGE, "honoured", "given to the chat template"),
    Row("include_usage", ("stream_options",), "honoured", "a last chunk with the usage"),
    Row("user safety_identifier metadata store", _BOTH, "harmless", "nothing is stored or passed on"),
    Row("service_tier request_id rid", _BOTH, "harmless", "one tier, request ids of our own"),
    Row("prompt_cache_key session_id", _BOTH, "harmless", "prefixes are found without it"),
    Row(
        "prompt_cache_retention prompt_cache_options cache_control", _TEXT, "harmless", "prefixes are cached without it"
    ),
    Row("prediction", _BOTH, "harmless", "only makes an answer quicker"),
    Row("parallel_tool_calls", _TEXT, "harmless", "there are no tool calls"),
    Row("spaces_between_special_tokens", _BOTH, "harmless", "tokenizers in this format write none"),
    Row(
        "refusal annotations provider_specific_fields thinking_blocks",
        _MESSAGE,
        "harmless",
        "clients send an answer back with them",
    ),
    Row("include_obfuscation", ("stream_options",), "harmless", "only pads the chunks"),
    Row("functions", _CHAT, "refused", "use `tools`"),
    Row("function_call", _CHAT, "refused", "use `tool_choice`", (*_EMPTY, "none", "auto")),
    Row("function_call", _MESSAGE, "refused", "use `tool_calls`"),
    Row("tools functions", _TEXT, "refused", "tools need a chat"),
    Row("tool_choice function_call", _TEXT, "refused", "tools need a chat", (*_EMPTY, "none", "auto")),
    Row("audio", _MESSAGE, "refused", "only text is understood"),
    Row("structural_tag json_schema regex ebnf grammar", _BOTH, "refused", "see `structured_outputs`"),
    Row(
        "guided_decoding_backend guided_whitespace_pattern",
        _BOTH,
        "refused",
        "one backend; between the parts of JSON is nothing, a blank, or a line break and blanks",
    ),
    Row("modalities", _BOTH, "refused", "only text is generated", (*_EMPTY, ["text"])),
    Row("audio mm_processor_kwargs media_io_kwargs", _BOTH, "refused", "only text is understood"),
    Row("web_search_options moderation", _BOTH, "refused", "nothing is looked up"),
    Row("chat_template", _BOTH, "refused", "the model's own template is used as it is"),
    Row("chat_template_kwargs documents reasoning_effort", _TEXT, "refused", "text completions use no template"),
    Row("add_special_tokens", _CHAT, "refused", "off for chats: the template writes them", (False,)),
    Row("add_special_tokens", _TEXT, "refused", "on for texts; send token ids instead", (True,)),
    Row(
        "reasoning thinking thinking_budget verbosity",
        _BOTH,
        "refused",
        "see `reasoning_effort`, `enable_thinking`, `max_reasoning_tokens`",
    ),
    Row(
        "enable_thinking thinking_token_budget max_reasoning_tokens include_reasoning separate_reasoning",
        _TEXT,
        "refused",
        "only the answers to chats are parsed",
        (*_EMPTY, True),
    ),
    Row("length_penalty", _BOTH, "refused", "there is no beam search", (1,)),
    Row("use_beam_search early_stopping", _BOTH, "refused", "there is no beam search"),
    Row("best_of", _CHAT, "refused", "ask for `n` and choose yourself", (0, 1)),
    Row(
        "logits_processors custom_logit_processor vllm_xargs nvext", _BOTH, "refused", "nothing is passed to an engine"
    ),
    Row(
        "typical_p top_a top_n_sigma tfs_z mirostat mirostat_tau mirostat_eta xtc_probability xtc_threshold "
        "dry_multiplier dry_base dry_allowed_length stop_regex",
        _BOTH,
        "refused",
        "this way of sampling or stopping is not supported",
    ),
    Row("no_stop_trim", _BOTH, "refused", "see `include_stop_str_in_output`"),
    Row("suffix", _TEXT, "refused", "only the end of a text is completed"),
    Row(
        "prompt_logprobs logprob_token_ids return_tokens_as_token_ids return_hidden_states",
        _BOTH,
        "refused",
        "not part of an answer here",
    ),
    Row("continuous_usage_stats", ("stream_options",), "refused", "usage comes in the last chunk"),
    Row("lora_path session_params kv_transfer_params", _BOTH, "refused", "requests name a model and a whole prompt"),
    # ---- /v1/responses and /v1/messages
    Row("model stream temperature top_p", _DIALECTS, "honoured", "as for chats"),
    Row("top_k min_p repetition_penalty seed ignore_eos deadline_s", _DIALECTS, "honoured", "as for chats"),
    Row("cache_hint retention no_store cache_salt priority", _DIALECTS, "honoured", "as for chats"),
    Row("input", _RESPONSES, "honoured", "a text, or messages, reasoning, function calls and their outputs; text only"),
    Row("instructions", _RESPONSES, "honoured", "a system message before the input"),
    Row("max_output_tokens", _RESPONSES, "honoured", "no more than the window allows, which is the default"),
    Row(
        "messages system",
        _ANTHROPIC,
        "honoured",
        "text, thinking, uses of tools and their results; the answer goes on with a last one of the assistant",
    ),
    Row("max_tokens", _ANTHROPIC, "honoured", "required, but to count tokens; no more than the window allows"),
    Row("stop_sequences", _ANTHROPIC, "honoured", "up to 16 strings; not part of the answer"),
    Row("tools tool_choice", _DIALECTS, "honoured", "functions of the client's own, as for chats"),
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
    Row("metadata service_tier", _DIALECTS, "harmless", "nothing is stored; one tier"),
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
        "context_management",
        _DIALECTS,
        "refused",
        "the context is what is sent",
        (*_EMPTY, {"edits": []}, _KEEP_THINKING),
    ),
    Row("diagnostics", _ANTHROPIC, "honoured", "`previous_message_id`: what changed since that request"),
    Row("container mcp_servers", _ANTHROPIC, "refused", "there is no such service here"),
)
