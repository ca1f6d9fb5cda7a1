"""What the files of a model folder say beside the weights: special tokens, templates, the model's own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from kvasir.protocol.errors import ModelError
from kvasir.protocol.sampling import Sampling


def special_tokens(path: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens by name, and make the tokenizer treat them as such, as `transformers` does.

    `special_tokens_map.json` is older than `added_tokens_decoder`, and counts only without it.
    """
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **read_json(path / "special_tokens_map.json")}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    if isinstance(extra, dict):
        named, extra = {**named, **extra}, []
    tokens = {name: token for name, value in named.items() if (token := _token(value))}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in [*tokens.values(), *map(_token, extra)]:
        if token and token not in known and tokenizer.token_to_id(token) is not None:
            tokenizer.add_special_tokens([token])
    return tokens


def eos_token_ids(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in found):
        raise ModelError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(found)


def sampling_defaults(path: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Return what `generation_config.json` says of sampling (what it calls `do_sample` is left to the temperature)."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := generation.get(name)) is not None}
    try:
        msgspec.convert(found, Sampling)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path / 'generation_config.json'}: {error}; mend or remove it") from None
    return found


def find_templates(path: Path, settings: dict[str, Any]) -> tuple[str, str | None] | None:
    """Return the chat template, and the one for requests with tools if that is another."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8"), None
    template = read_json(path / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        default, with_tools = named.get("default"), named.get("tool_use")
        return (default, with_tools if isinstance(with_tools, str) else None) if isinstance(default, str) else None
    return (template, None) if isinstance(template, str) else None


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}; fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; fetch the model again")
    return content


def _token(value: Any) -> str:
    """A special token's text: a string, or an object with `content`, or nothing."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
