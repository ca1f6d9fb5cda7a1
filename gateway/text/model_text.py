"""Text to token ids and back: a model folder's tokenizer, its chat template.

Everything comes from the folder that the workers load their weights from: `tokenizer.json` (read by the `tokenizers`
library), `tokenizer_config.json` and `chat_template.jinja`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from kvasir.gateway.text.answer_parser import AnswerFormat, find_format
from kvasir.gateway.text.answers import Answers
from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.gateway.text.detokenizer import Detokenizer
from kvasir.gateway.text.model_files import (
    eos_token_ids,
    find_templates,
    read_json,
    sampling_defaults,
    special_tokens,
)
from kvasir.gateway.text.piece_cache import Memory
from kvasir.gateway.text.token_bytes import token_bytes_by_id
from kvasir.gateway.text.word_cache import make_word_cache
from kvasir.protocol.client_messages import PLAIN_CHAT, ChatMessage, ChatOptions
from kvasir.protocol.errors import BadRequest, ModelError
from kvasir.protocol.tokens import pack_tokens, unpack_tokens

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
        answers: AnswerFormat | None = None,
    ) -> None:
        """`vocab_size`: ids the model knows. `sampling`: the model's own defaults, of the fields of `Sampling`.
        `answers`: how it writes reasoning and calls of tools."""
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes_by_id(tokenizer, vocab_size)
        self._longest = max(1, *map(len, self._token_bytes))
        self._words = make_word_cache(tokenizer)
        self._around = _around(tokenizer)
        self._template = template
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.sampling = sampling or {}
        self.answers = Answers(tokenizer, answers or AnswerFormat(), self.decode_all)

    def max_chars(self, num_tokens: int) -> int:
        """Return a length in characters that no text of `num_tokens` tokens reaches.

        A token stands for at most its bytes; the factor is for normalisers that compose or drop characters.
        """
        return 4 * num_tokens * self._longest

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with whatever the tokenizer puts around a text (a BOS token, say)."""
        return unpack_tokens(self.pack(text))

    def encode_chat(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN_CHAT) -> list[int]:
        """Return the token ids of a conversation up to where the assistant's next answer begins.

        Raises:
            BadRequest: as `render_chat`.
        """
        return unpack_tokens(self.pack_chat(messages, None, options))

    def pack(self, text: str, memory: Memory | None = None) -> bytes:
        """Return what `encode` does, packed. `memory`: of what its owner has sent, which makes it quicker.

        Raises:
            UnicodeEncodeError, TypeError: `text` is no valid Unicode.
        """
        packed = self._pack_known(text, memory)
        if packed is not None and self._around is not None:
            return self._around[0] + packed + self._around[1]
        return pack_tokens(self._tokenizer.encode(text).ids)

    def pack_chat(
        self, messages: Sequence[ChatMessage], memory: Memory | None = None, options: ChatOptions = PLAIN_CHAT
    ) -> bytes:
        """Return what `encode_chat` does, packed; `memory` and errors as `pack`.

        Raises:
            BadRequest: as `render_chat`.
        """
        text = self.render_chat(messages, options)
        text += self.answers.forced(text, options)
        packed = self._pack_known(text, memory)
        if packed is None:
            packed = pack_tokens(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return packed

    def word_forms(self, word: str) -> list[list[int]]:
        """Return the token ids of `word` as it begins a text and after a space, without what goes around a text."""
        forms = (word.lstrip() or word, " " + word.lstrip())
        found = [self._tokenizer.encode(form, add_special_tokens=False).ids for form in forms]
        return [ids for index, ids in enumerate(found) if ids and ids not in found[:index]]

    def _pack_known(self, text: str, memory: Memory | None) -> bytes | None:
        """Return the packed ids of `text` alone, word by word if it is short, else piece by piece; None: it is all the
        library's."""
        if self._words is None or memory is None:
            return None
        if len(text) > QUICK_CHARS:
            return self._words.encode_pieces(text, memory)
        ids = self._words.encode(text, memory.words)
        return None if ids is None else pack_tokens(ids)

    def render_chat(self, messages: Sequence[ChatMessage], options: ChatOptions = PLAIN_CHAT) -> str:
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

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """As `decode`, special tokens by their names."""
        names = self._all_token_bytes
        return b"".join([names[token_id] for token_id in token_ids if token_id < len(names)]).decode("utf-8", "replace")

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
        for_parser: bool = False,
    ) -> Detokenizer:
        """Return a fresh incremental detokeniser that ends at any of the `stop` strings, see `Detokenizer`.

        `for_parser`: an `AnswerParser` reads the text, which must see the special tokens that begin and end its parts.
        """
        token_bytes = self._parser_token_bytes if for_parser else self._token_bytes
        if not skip_special_tokens:
            token_bytes = self._all_token_bytes
        return Detokenizer(token_bytes, tuple(stop), tuple(end_token_ids), keep_stop=keep_stop, min_tokens=min_tokens)

    @cached_property
    def _all_token_bytes(self) -> list[bytes]:
        """As `_token_bytes`, special tokens by their names."""
        return self._with_special_tokens(None)

    @cached_property
    def _parser_token_bytes(self) -> list[bytes]:
        """As `_token_bytes`, with those special tokens that the parser of answers must see."""
        return self._with_special_tokens(self.answers.marks)

    def _with_special_tokens(self, names: Collection[str] | None) -> list[bytes]:
        found = list(self._token_bytes)
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special and token_id < len(found) and (names is None or token.content in names):
                found[token_id] = token.content.encode()
        return found


def load_text(path: Path, tool_parser: str = "auto") -> ModelText:
    """Read the tokenizer and the chat template of a model folder. `tool_parser`: as `find_format` takes it.

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
    settings = read_json(path / "tokenizer_config.json")
    config = read_json(path / "config.json")
    tokens = special_tokens(path, settings, tokenizer)
    generation = read_json(path / "generation_config.json")
    vocab_size = config.get("vocab_size") or tokenizer.get_vocab_size(with_added_tokens=True)
    try:
        eos = eos_token_ids(generation.get("eos_token_id", config.get("eos_token_id")))
        sources, sampling = find_templates(path, settings), sampling_defaults(path, generation)
        template = None if sources is None else ChatTemplate(sources[0], tokens, sources[1])
        answers = None if template is None else find_format(template.source, tool_parser)
        return ModelText(tokenizer, template, int(vocab_size), eos, sampling, answers)
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template of {path} cannot be read: {error}; mend or remove it") from None
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


def _around(tokenizer: Tokenizer) -> tuple[bytes, bytes] | None:
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
    return None if found is None else (pack_tokens(found[0]), pack_tokens(found[1]))
