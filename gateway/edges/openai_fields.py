"""The one table of the OpenAI routes' request fields: what is honoured, what is harmless, what is refused and why.

Parsing is made from it: a field that is not in the table is refused with the nearest name that is honoured, and a
refused field passes only with a value that changes nothing. docs/api.md shows the same rows; a test compares them.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Raw

from kvasir.protocol.errors import BadRequest

Place = Literal["chat", "completions", "message", "stream_options"]
Verdict = Literal["honoured", "harmless", "refused"]
_EMPTY: tuple[Any, ...] = (False, 0, "", [], {})
MAX_VALUE_BYTES = 65_536  # of a field that is honoured, the prompt aside


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

FIELDS: tuple[Row, ...] = (
    Row("model", _BOTH, "honoured", "may be left out by a tenant of one model"),
    Row("messages", _CHAT, "honoured", "text only; through the model's chat template"),
    Row("prompt", _TEXT, "honoured", "a text, token ids, or up to 16 of either"),
    Row("max_tokens", _BOTH, "honoured", "default: chat up to the window, completions 16"),
    Row("max_completion_tokens", _CHAT, "honoured", "wins over `max_tokens`"),
    Row("temperature top_p top_k min_p repetition_penalty", _BOTH, "honoured", "default: the model's own, see below"),
    Row("presence_penalty frequency_penalty", _BOTH, "honoured", "look at generated tokens"),
    Row("logit_bias", _BOTH, "honoured", "up to 1,024 token ids, -100 to 100"),
    Row("seed", _BOTH, "honoured", "each choice of each prompt draws by its own, derived from this one"),
    Row("n", _BOTH, "honoured", "1 to 8"),
    Row("stop", _BOTH, "honoured", "up to 16 strings; not part of the answer"),
    Row("stop_token_ids ignore_eos", _BOTH, "honoured", "vLLM's; up to 256 ids"),
    Row("stream stream_options", _BOTH, "honoured", "server-sent events"),
    Row("logprobs top_logprobs", _CHAT, "honoured", "up to 20"),
    Row("logprobs", _TEXT, "honoured", "up to 20"),
    Row("best_of", _TEXT, "honoured", "up to `n`, where it chooses nothing"),
    Row("deadline_s", _BOTH, "honoured", "ours: the request ends with an error after so many seconds"),
    Row("cache_hint retention", _BOTH, "honoured", "ours: what to keep in the KV cache"),
    Row("role content", _MESSAGE, "honoured", "`developer` is `system`; content is text or text parts"),
    Row("include_usage", ("stream_options",), "honoured", "a last chunk with the usage"),
    Row("user safety_identifier metadata store", _BOTH, "harmless", "nothing is stored or passed on"),
    Row("service_tier priority request_id rid", _BOTH, "harmless", "one tier, tenants in turn, request ids of our own"),
    Row(
        "prompt_cache_key prompt_cache_retention prompt_cache_options cache_control session_id",
        _BOTH,
        "harmless",
        "prefixes are cached and found without it",
    ),
    Row("prediction", _BOTH, "harmless", "only makes an answer quicker"),
    Row("parallel_tool_calls", _BOTH, "harmless", "there are no tool calls"),
    Row("spaces_between_special_tokens", _BOTH, "harmless", "special tokens are not shown"),
    Row("refusal annotations", _MESSAGE, "harmless", "clients send an answer back with them"),
    Row("include_obfuscation", ("stream_options",), "harmless", "only pads the chunks"),
    Row("tools functions", _BOTH, "refused", "tool calls are not supported"),
    Row("tool_choice function_call", _BOTH, "refused", "tool calls are not supported", ("none", "auto")),
    Row("tool_calls tool_call_id function_call", _MESSAGE, "refused", "tool calls are not supported; send their text"),
    Row("name", _MESSAGE, "refused", "chat templates are given no names; write it into the content"),
    Row("audio reasoning reasoning_content", _MESSAGE, "refused", "only the content is read"),
    Row("response_format", _BOTH, "refused", "only text is generated", (*_EMPTY, {"type": "text"})),
    Row(
        "structured_outputs guided_json guided_regex guided_choice guided_grammar guided_json_object "
        "guided_decoding_backend guided_whitespace_pattern structural_tag json_schema regex ebnf grammar",
        _BOTH,
        "refused",
        "answers are not constrained",
    ),
    Row("modalities", _BOTH, "refused", "only text is generated", (*_EMPTY, ["text"])),
    Row("audio mm_processor_kwargs media_io_kwargs", _BOTH, "refused", "only text is understood"),
    Row("web_search_options moderation documents", _BOTH, "refused", "nothing is looked up"),
    Row("chat_template chat_template_kwargs", _BOTH, "refused", "the model's own template is used as it is"),
    Row("add_generation_prompt", _CHAT, "refused", "always on", (True,)),
    Row("continue_final_message", _CHAT, "refused", "a chat goes on with a new message"),
    Row("add_special_tokens", _CHAT, "refused", "off for chats: the template writes them", (False,)),
    Row("add_special_tokens", _TEXT, "refused", "on for texts; send token ids instead", (True,)),
    Row(
        "reasoning_effort reasoning thinking enable_thinking thinking_token_budget thinking_budget verbosity",
        _BOTH,
        "refused",
        "the model's template and sampling know no such setting",
    ),
    Row("include_reasoning separate_reasoning", _BOTH, "refused", "reasoning is not told apart", (*_EMPTY, True)),
    Row("min_tokens bad_words allowed_token_ids", _BOTH, "refused", "not supported yet"),
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
    Row("skip_special_tokens", _BOTH, "refused", "special tokens are never shown", (True,)),
    Row("include_stop_str_in_output no_stop_trim", _BOTH, "refused", "an answer ends before its stop string"),
    Row("echo suffix", _TEXT, "refused", "an answer holds what was generated; only the end of a text is completed"),
    Row("echo", _CHAT, "refused", "an answer holds what was generated"),
    Row("truncate_prompt_tokens", _BOTH, "refused", "a prompt that is too long is refused"),
    Row(
        "prompt_logprobs logprob_token_ids return_token_ids return_tokens_as_token_ids return_hidden_states",
        _BOTH,
        "refused",
        "not part of an answer here",
    ),
    Row("continuous_usage_stats", ("stream_options",), "refused", "usage comes in the last chunk"),
    Row("lora_path session_params kv_transfer_params", _BOTH, "refused", "requests name a model and a whole prompt"),
    Row("cache_salt", _BOTH, "refused", "a tenant's requests share its cache; make a tenant for what must not"),
)


class FieldCheck:
    """Checks the names of the fields of one kind of object, and that none changes the answer unheard."""

    def __init__(self, place: Place) -> None:
        self._rows = {name: row for row in FIELDS if place in row.places for name in row.names.split()}
        self.honoured = [name for name, row in self._rows.items() if row.verdict == "honoured"]
        names = [(name, Raw, None) for name in self._rows]
        self._type = msgspec.defstruct(place, names, forbid_unknown_fields=True)

    def with_harmless(self, honoured: type[msgspec.Struct], *others: tuple[Any, ...]) -> Any:
        """Return `honoured` with the harmless fields added, undecoded, and `others` as `defstruct` takes them."""
        harmless = [(name, Raw, None) for name, row in self._rows.items() if row.verdict == "harmless"]
        name = honoured.__name__
        return msgspec.defstruct(
            name, [*others, *harmless], bases=(honoured,), kw_only=True, forbid_unknown_fields=True
        )

    def honoured_of(self, raw: Raw | bytes, where: str = "") -> dict[str, Raw]:
        """Return the honoured fields of the object `raw`, undecoded. `where`: what its names are shown after.

        Raises:
            BadRequest: an unknown field, a refused one that would change the answer, or a value that is large (it
                would take long to decode); `param` names it.
            msgspec.DecodeError: no JSON object.
        """
        try:
            values = msgspec.json.decode(raw, type=self._type)
        except msgspec.ValidationError as error:
            found = re.search(r"unknown field `(.*?)`$", str(error), re.DOTALL)
            if found is None:
                raise
            near = get_close_matches(found[1], self.honoured, 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out; docs/api.md lists those there are"
            param = where + found[1][:80]
            raise BadRequest(f"{param} is not known here: {hint}", param=param) from None
        kept = {}
        for name, row in self._rows.items():
            value, param = getattr(values, name), where + name
            if value is None or row.verdict == "harmless":
                continue
            if row.verdict == "honoured":
                if len(value) > MAX_VALUE_BYTES and name not in ("messages", "prompt", "content"):
                    raise BadRequest(f"{param} has {len(value)} bytes, {MAX_VALUE_BYTES} are allowed", param=param)
                kept[name] = value
            elif len(value) > 64 or msgspec.json.decode(value) not in (None, *row.off):
                raise BadRequest(f"{param} is not supported here: {row.note}; leave it out", param=param)
        return kept
