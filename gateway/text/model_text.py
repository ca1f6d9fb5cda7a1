"""Text to token ids and back: a model folder's tokenizer, its chat template.

Everything comes from the folder that the workers load their weights from: `tokenizer.json` (read by the `tokenizers`
library), `tokenizer_config.json` and `chat_template.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from tokenizers import Tokenizer

from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.gateway.text.detokenizer import Detokenizer
from kvasir.gateway.text.token_bytes import token_bytes_by_id
from kvasir.gateway.text.word_cache import Words, make_word_cache
from kvasir.protocol.client_messages import ChatMessage, ChatOptions
from kvasir.protocol.errors import BadRequest, ModelError
from kvasir.protocol.messages import Sampling

QUICK_CHARS = 8_192  # longer texts belong into a thread: the library takes about 3 ms for so many


class ModelText:
    """Tokenizer and chat template of one model. Immutable; `encode*` may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        sampling: dict[str, Any] | None = None,
    ) -> None:
        """`vocab_size`: ids the model knows. `sampling`: the model's own defaults, of the fields of `Sampling`."""
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes_by_id(tokenizer, vocab_size)
        self._longest = max(1, *map(len, self._token_bytes))
        self._words = make_word_cache(tokenizer)
        self._around = _around(tokenizer)
        self._template = template
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.sampling = sampling or {}

    def max_chars(self, num_tokens: int) -> int:
        """Return a length in characters that no text of `num_tokens` tokens reaches.

        A token stands for at most its bytes; the factor is for normalisers that compose or drop characters.
        """
        return 4 * num_tokens * self._longest

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, memory: Words | None = None) -> list[int]:
        """Return the token ids of `text`, with whatever the tokenizer puts around a text (a BOS token, say).

        `memory`: of the words that its owner has sent, which makes short texts quicker; None: without one.
        """
        ids = self._encode_quickly(text, memory)
        if ids is not None and self._around is not None:
            return [*self._around[0], *ids, *self._around[1]]
        whole: list[int] = self._tokenizer.encode(text).ids
        return whole

    def encode_chat(
        self, messages: Sequence[ChatMessage], memory: Words | None = None, options: ChatOptions | None = None
    ) -> list[int]:
        """Return the token ids of a conversation up to where the assistant's next answer begins; `memory` as `encode`.

        Raises:
            BadRequest: as `render_chat`.
        """
        text = self.render_chat(messages, options)
        ids = self._encode_quickly(text, memory)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def word_forms(self, word: str) -> list[list[int]]:
        """Return the token ids of `word` as it begins a text and after a space, without what goes around a text."""
        forms = (word.lstrip() or word, " " + word.lstrip())
        found = [self._tokenizer.encode(form, add_special_tokens=False).ids for form in forms]
        return [ids for index, ids in enumerate(found) if ids and ids not in found[:index]]

    def _encode_quickly(self, text: str, memory: Words | None) -> list[int] | None:
        """Return the ids of a short text; long ones go to the library, which works without Python's lock."""
        if self._words is None or memory is None or len(text) > QUICK_CHARS:
            return None
        return self._words.encode(text, memory)

    def render_chat(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> str:
        """Return the text of a conversation, by default with the cue for the assistant's answer.

        Raises:
            BadRequest: no template, or as `ChatTemplate.render`.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template; send a plain prompt instead (/v1/completions)")
        return self._template.render(messages, options)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` add to a text before them, special tokens left out."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which need not be whole characters; none for special tokens."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def detokenizer(
        self,
        stop: Sequence[str] = (),
        end_token_ids: Sequence[int] = (),
        *,
        keep_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> Detokenizer:
        """Return a fresh incremental detokeniser that ends at any of the `stop` strings, see `Detokenizer`."""
        token_bytes = self._token_bytes if skip_special_tokens else self._all_token_bytes
        return Detokenizer(token_bytes, tuple(stop), tuple(end_token_ids), keep_stop=keep_stop, min_tokens=min_tokens)

    @cached_property
    def _all_token_bytes(self) -> list[bytes]:
        """As `_token_bytes`, special tokens by their names."""
        found = list(self._token_bytes)
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special and token_id < len(found):
                found[token_id] = token.content.encode()
        return found


def load_text(path: Path) -> ModelText:
    """Read the tokenizer and the chat template of a model folder.

    Raises:
        ModelError: no folder, no tokenizer.json, or one that cannot be read; names the file and says what now.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is no folder; name a model folder in Hugging Face format")
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{path} has no tokenizer.json; save the tokenizer in its fast format beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} cannot be read as a tokenizer: {error}; fetch the model again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = _read_json(path / "tokenizer_config.json")
    config = _read_json(path / "config.json")
    tokens = _special_tokens(path, settings, tokenizer)
    generation = _read_json(path / "generation_config.json")
    vocab_size = config.get("vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True)
    try:
        eos = _eos_token_ids(generation.get("eos_token_id", config.get("eos_token_id")))
        source, sampling = _find_template(path, settings), _sampling_defaults(path, generation)
        template = None if source is None else ChatTemplate(source, tokens)
        return ModelText(tokenizer, template, int(vocab_size), eos, sampling)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template of {path} cannot be read: {error}; mend or remove it") from None
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _special_tokens(path: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens by name, and make the tokenizer treat them as such, as `transformers` does.

    `special_tokens_map.json` is older than `added_tokens_decoder`, and counts only without it.
    """
    if "added_tokens_decoder" not in settings:
        settings = {**settings, **_read_json(path / "special_tokens_map.json")}
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


def _eos_token_ids(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int for token_id in found):
        raise ModelError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(found)


def _sampling_defaults(path: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Return what `generation_config.json` says of sampling (what it calls `do_sample` is left to the temperature)."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := generation.get(name)) is not None}
    try:
        msgspec.convert(found, Sampling)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path / 'generation_config.json'}: {error}; mend or remove it") from None
    return found


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the ids that the tokenizer puts before and after a text; None if it does not simply do that."""
    found = None
    for text in ("a", "b c"):
        plain: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        whole: list[int] = tokenizer.encode(text).ids
        starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        around = [(whole[:start], whole[start + len(plain) :]) for start in starts]
        if len(around) != 1 or found not in (None, around[0]):
            return None
        found = around[0]
    return found


def _find_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = _read_json(path / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(file: Path) -> dict[str, Any]:
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
