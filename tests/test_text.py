"""Tokenizer, chat template and incremental detokenisation, against the public `transformers` and `tokenizers`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gateway.text import load_text
from protocol.client_messages import ChatMessage
from protocol.errors import BadRequest, ModelError

DEMO = Path(__file__).resolve().parent.parent / "kvasir" / "demo_model"
TEXT = load_text(DEMO)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
CONVERSATION = [
    ChatMessage("user", "Write a “function”.\nOne line."),
    ChatMessage("assistant", "def f(): pass"),
    ChatMessage("user", " and another <b>{{ 7 * 7 }}</b>"),
]


def folder_with_template(tmp_path: Path, template: str | None) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template*"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL, None], ids=["llama3", "chatml", "mistral", "bundled"])
def test_a_chat_renders_and_tokenises_as_transformers_does(tmp_path: Path, template: str | None) -> None:
    folder = DEMO if template is None else folder_with_template(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    turns = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    ours = load_text(folder)
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(CONVERSATION) == expected
    assert ours.encode_chat(CONVERSATION) == theirs(expected, add_special_tokens=False)["input_ids"]


def test_what_a_user_writes_is_never_run_as_a_template() -> None:
    assert "{{ 7 * 7 }}" in TEXT.render_chat(CONVERSATION)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    folder = folder_with_template(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadRequest, match="refuses"):
        load_text(folder).render_chat(CONVERSATION)


def test_a_refusing_template_is_quoted_and_a_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="must alternate"):
        load_text(folder_with_template(tmp_path, MISTRAL)).render_chat(CONVERSATION[1:])
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(BadRequest, match="no chat template"):
        load_text(folder_with_template(tmp_path, None)).render_chat(CONVERSATION)


def test_folders_that_are_no_model_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        load_text(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_text(tmp_path)


def in_pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in zip(borders, borders[1:], strict=False)]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 4095), max_size=8), st.lists(st.integers(0, 1000), max_size=12))
def test_pieces_of_text_add_up_to_the_whole_decode(text: str, more: list[int], cuts: list[int]) -> None:
    """Random ids at the end make invalid UTF-8; the decoder's replacement characters must come out the same."""
    ids = TEXT.encode(text) + more
    detokenizer = TEXT.detokenizer()
    pushed = "".join(detokenizer.push(piece) for piece in in_pieces(ids, cuts)) + detokenizer.finish()
    assert pushed == TEXT.decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc é😀", max_size=60),
    st.lists(st.text("abc é", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_an_answer_ends_exactly_before_the_stop_string_that_is_complete_first(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    ids = TEXT.encode(text)
    whole = TEXT.decode(ids)
    found = [(whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole]
    detokenizer = TEXT.detokenizer(stop)
    pushed = "".join(detokenizer.push(piece) for piece in in_pieces(ids, cuts)) + detokenizer.finish()
    assert pushed == (whole[: min(found)[1]] if found else whole)
    assert detokenizer.stopped == bool(found)


def test_special_tokens_are_not_shown() -> None:
    end = TEXT._tokenizer.token_to_id("<|endoftext|>")
    assert end is not None
    detokenizer = TEXT.detokenizer()
    assert detokenizer.push([*TEXT.encode("x = 1"), end]) + detokenizer.finish() == "x = 1"
