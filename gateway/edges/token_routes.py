"""`/tokenize` and `/detokenize`, as vLLM has them, and `/v1/messages/count_tokens`, as Anthropic has it."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct

from kvasir.gateway.core.api import ModelInfo
from kvasir.gateway.edges.chat_turns import Turn
from kvasir.gateway.edges.openai_bodies import MAX_TURNS, ChatBody
from kvasir.gateway.edges.openai_requests import asked_of_chat
from kvasir.gateway.text.json_input import read_json
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.client_messages import CompletionRequest
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.tokens import unpack_tokens


class TokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """`prompt` or `messages`. Texts get the tokenizer's special tokens, chats those that their template writes."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[Turn], Meta(max_length=MAX_TURNS)] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Raw = Raw()
    tools: Raw = Raw()


class DetokenizeBody(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str = ""
    tokens: list[int]


def read_tokenize(raw: bytes) -> tuple[CompletionRequest, bool]:
    """Return what is to be tokenised, and whether the tokens' texts are wanted.

    Raises:
        BadRequest: no valid body; `param` names the field.
    """
    body: TokenizeBody = read_json(raw, TokenizeBody)
    wants_texts = bool(body.return_token_strs)
    if body.add_special_tokens is (body.messages is not None):
        raise BadRequest("add_special_tokens is true for prompts and false for chats", param="add_special_tokens")
    if body.messages is None:
        return CompletionRequest(0, "", body.model, text=body.prompt or ""), wants_texts
    if body.prompt is not None:
        raise BadRequest("give either prompt or messages", param="prompt")
    chat = ChatBody(
        model=body.model,
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    return asked_of_chat(chat).requests[0], wants_texts


def tokenized(packed: bytes, info: ModelInfo, text: ModelText | None, *, wants_texts: bool) -> dict[str, Any]:
    """Return the answer to `/tokenize`."""
    ids = unpack_tokens(packed)
    texts = (
        [text.token_bytes(token_id).decode("utf-8", "replace") for token_id in ids] if wants_texts and text else None
    )
    return {"count": len(ids), "max_model_len": info.max_context, "tokens": ids, "token_strs": texts}
