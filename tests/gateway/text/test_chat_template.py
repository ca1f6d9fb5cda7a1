"""Chat templates: what `transformers` renders with the same options, and what a template does not know is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvasir.gateway.text.chat_template import ChatTemplate
from kvasir.protocol.client_messages import ChatMessage, ChatOptions
from kvasir.protocol.errors import BadRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}{{ ' ' + m.name if m.name else '' }}|>"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
DOCUMENTS = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + PLAIN
EFFORT = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}Effort: {{ reasoning_effort | default('low') }}"
    + PLAIN
)
CHAT = [ChatMessage("user", "Hi "), ChatMessage("assistant", "Well, I ")]


def render(source: str, messages: list[ChatMessage], **options: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages, ChatOptions(**options) if options else None)


def expected(source: str, messages: list[ChatMessage], **options: Any) -> str:
    turns = [{"role": m.role, "content": m.content, **({"name": m.name} if m.name else {})} for m in messages]
    texts, _ = render_jinja_template([turns], chat_template=source, **TOKENS, **options)
    return str(texts[0])


@pytest.mark.parametrize("source", [PLAIN, TRIMMING, DOCUMENTS, EFFORT])
def test_a_final_message_is_continued_as_transformers_does(source: str) -> None:
    ours = render(source, CHAT, continue_final_message=True, add_generation_prompt=False)
    assert ours == expected(source, CHAT, continue_final_message=True)
    assert ours.endswith("Well, I" if source == TRIMMING else "Well, I ")


def test_the_cue_can_be_left_out() -> None:
    assert render(PLAIN, CHAT) == expected(PLAIN, CHAT, add_generation_prompt=True)
    assert render(PLAIN, CHAT, add_generation_prompt=False) == expected(PLAIN, CHAT)


def test_names_documents_and_variables_reach_the_template() -> None:
    named = [ChatMessage("user", "Hi", "Ann")]
    documents = [{"title": "A", "text": "b"}]
    ours = render(DOCUMENTS, named, documents=json.dumps(documents).encode(), variables=b'{"enable_thinking": false}')
    assert ours == expected(DOCUMENTS, named, documents=documents, enable_thinking=False, add_generation_prompt=True)
    assert "user Ann" in ours and "[A: b]" in ours and ours.endswith("<think></think>")


def test_reasoning_effort_is_the_templates_own_or_a_matter_of_on_and_off() -> None:
    assert render(EFFORT, CHAT, reasoning_effort="high").startswith("Effort: high")
    assert render(PLAIN, CHAT, reasoning_effort="none").endswith("<think></think>")
    assert render(PLAIN, CHAT, reasoning_effort="high") == render(PLAIN, CHAT)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"documents": b'[{"text": "x"}]'}, "documents", "knows no documents"),
        ({"documents": b'["x"]'}, "documents", "knows no documents"),
        ({"variables": b'{"colour": 1}'}, "chat_template_kwargs", "no variable 'colour' to set; it has: none"),
        ({"variables": b'{"messages": []}'}, "chat_template_kwargs", "no variable 'messages'"),
        ({"variables": b'{"bos_token": "x"}'}, "chat_template_kwargs", "no variable 'bos_token'"),
        ({"variables": b"[1]"}, "chat_template_kwargs", "Expected `object`"),
        ({"variables": b'{"x":' + b"[" * 100_000}, "chat_template_kwargs", "nested too deeply"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "knows no reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message", "needs add_generation_prompt: false"),
    ],
)
def test_what_the_template_does_not_know_is_refused_by_name(options: dict[str, Any], param: str, words: str) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadRequest, match=words) as caught:
        render(source, CHAT, **options)
    assert caught.value.param == param


def test_a_message_that_the_template_drops_or_that_is_empty_cannot_be_continued() -> None:
    options = {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(BadRequest, match="cannot be continued"):
        render("{{ messages[0].content }}", CHAT, **options)
    with pytest.raises(BadRequest, match="no content"):
        render(PLAIN, [ChatMessage("assistant", "")], **options)
