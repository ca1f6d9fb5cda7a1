"""Tokenizer, chat template and incremental detokenisation, against the public `transformers` and `tokenizers`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from kvasir.gateway.text.model_text import ModelText, load_text
from kvasir.protocol.client_messages import ChatMessage
from kvasir.protocol.errors import BadRequest, ModelError

DEMO = Path(__file__).resolve().parents[3] / "kvasir" / "demo_model"
TEXT = load_text(DEMO)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
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
GENERATION = """{%- set ns = namespace(turns=0) -%}
{%- for message in messages -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ message.content }}<|im_end|>{%- endgeneration -%}
    {%- else -%}
        {{ ns.turns }} {{ message | tojson(indent=1) }} {{ dict(a=1) | tojson }} {{ bos_token is defined }}
    {%- endif -%}
    {%- if loop.index > 5 %}{% break %}{% endif -%}
{%- endfor -%}
{%- if tools is not none or documents is not none %}{{ raise_exception('no tools were given') }}{% endif -%}"""
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


@pytest.mark.parametrize(
    "template",
    [LLAMA3, CHATML, MISTRAL, GENERATION, None],
    ids=["llama3", "chatml", "mistral", "generation", "bundled"],
)
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


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__globals__['json'] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path, template: str) -> None:
    folder = folder_with_template(tmp_path, template)
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


def make_sentence_piece(decoder: decoders.Decoder) -> ModelText:
    """A tokenizer as Llama 2 and Mistral have: `▁` for spaces, single bytes as `<0xNN>` tokens."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "é", "▁é", "▁▁", ".", "你", "�"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return ModelText(tokenizer, None, len(names) + 8)


SENTENCE_PIECE = make_sentence_piece(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
)
METASPACE = make_sentence_piece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def decode_after_a_prompt(text: ModelText, ids: list[int]) -> str:
    """The oracle: what the public tokenizer decodes more when `ids` follow a prompt, here its token "a" or "."."""
    prompt = text._tokenizer.token_to_id(".")
    before = text._tokenizer.decode([prompt])
    whole = text._tokenizer.decode([prompt, *ids], skip_special_tokens=True)
    assert whole.startswith(before)
    return whole[len(before) :]


def push_in_pieces(text: ModelText, ids: list[int], cuts: list[int], stop: list[str] | None = None) -> tuple[str, bool]:
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    detokenizer = text.detokenizer(stop or ())
    pushed = "".join(detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(borders)) + detokenizer.finish()
    return pushed, detokenizer.stopped


@settings(max_examples=200)
@given(st.text(max_size=60), st.lists(st.integers(0, 4095), max_size=8), st.lists(st.integers(0, 1000), max_size=12))
def test_pieces_of_text_add_up_to_the_whole_decode(text: str, more: list[int], cuts: list[int]) -> None:
    """Random ids at the end make invalid UTF-8; the decoder's replacement characters must come out the same."""
    ids = TEXT.encode(text) + more
    pushed, _ = push_in_pieces(TEXT, ids, cuts)
    assert pushed == TEXT.decode(ids) == decode_after_a_prompt(TEXT, ids)


@settings(max_examples=200)
@given(
    st.sampled_from([SENTENCE_PIECE, METASPACE]),
    st.lists(st.one_of(st.sampled_from("aé你😀 "), st.integers(259, 271)), max_size=12),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_sentence_piece_answers_keep_their_first_space_and_join_their_bytes(
    text: ModelText, parts: list[str | int], cuts: list[int]
) -> None:
    ids = [id for part in parts for id in ([part] if isinstance(part, int) else [3 + byte for byte in part.encode()])]
    pushed, _ = push_in_pieces(text, ids, cuts)
    assert pushed == text.decode(ids) == decode_after_a_prompt(text, ids)


@given(st.lists(st.integers(0, 279), max_size=12), st.lists(st.integers(0, 1000), max_size=12))
def test_bytes_that_are_no_text_become_replacement_characters(ids: list[int], cuts: list[int]) -> None:
    """A model may well draw such tokens, and ids that only pad the vocabulary."""
    pushed, _ = push_in_pieces(SENTENCE_PIECE, ids, cuts)
    assert pushed == SENTENCE_PIECE.decode(ids)


def test_a_decoder_that_does_not_work_token_by_token_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="CTC"):
        make_sentence_piece(decoders.CTC())


@st.composite
def texts_with_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and strings that overlap in it or come close to being in it."""
    text = draw(st.text("ab é😀", min_size=1, max_size=30))
    starts = st.integers(0, len(text) - 1)
    spans = draw(st.lists(st.tuples(starts, st.integers(1, 4), st.sampled_from(["", "", "", "a"])), max_size=3))
    return text, [text[start : start + length] + more for start, length, more in spans]


@settings(max_examples=300)
@given(texts_with_stops(), st.lists(st.integers(0, 1000), max_size=4))
def test_an_answer_ends_exactly_before_the_stop_string_that_comes_first(
    case: tuple[str, list[str]], cuts: list[int]
) -> None:
    text, stop = case
    ids = TEXT.encode(text)
    whole = TEXT.decode(ids)
    pushed, stopped = push_in_pieces(TEXT, ids, cuts, stop)
    # As if looked for after every character: the first to be complete counts, of those the one that begins first.
    ends = {whole.find(each) + len(each): 0 for each in stop if each in whole}
    if not ends:
        assert (pushed, stopped) == (whole, False)
        return
    seen = whole[: min(ends)]
    assert stopped
    assert pushed == whole[: min(seen.find(each) for each in stop if each in seen)]


def test_special_tokens_are_not_shown() -> None:
    end = TEXT._tokenizer.token_to_id("<|endoftext|>")
    assert push_in_pieces(TEXT, [*TEXT.encode("x = 1"), end], []) == ("x = 1", False)


SHOW = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ more }}"
BOS = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("config", "special_map"),
    [
        ({}, {"bos_token": "<|endoftext|>", "eos_token": BOS}),
        ({"bos_token": "def"}, {"bos_token": "<|endoftext|>"}),
        ({"added_tokens_decoder": {}, "bos_token": "def"}, {"bos_token": "<|endoftext|>"}),
        ({"extra_special_tokens": {"image_token": "return", "more": "self"}}, {}),
        ({"image_token": "return", "extra_special_tokens": ["self"]}, {"additional_special_tokens": ["import"]}),
        ({"additional_special_tokens": ["self"], "bos_token": None, "eos_token": "return"}, {}),
    ],
)
def test_special_tokens_are_read_as_transformers_reads_them(
    tmp_path: Path, config: dict[str, object], special_map: dict[str, object]
) -> None:
    folder = folder_with_template(tmp_path, SHOW)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": SHOW, **config})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), load_text(folder)
    turns = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    assert ours.render_chat(CONVERSATION) == theirs.apply_chat_template(turns, tokenize=False)
    text = "def f(self): return<|endoftext|>import x"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours._tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_generation_config_gives_the_end_and_the_sampling(tmp_path: Path) -> None:
    assert TEXT.eos_token_ids == (0, 4)
    assert TEXT.sampling == {"temperature": 0.7, "top_p": 0.95}
    folder = folder_with_template(tmp_path, None)
    (folder / "generation_config.json").write_text('{"top_k": 20, "min_p": null, "max_new_tokens": 5}')
    text = load_text(folder)
    assert text.sampling == {"top_k": 20}
    assert text.eos_token_ids == (0, 4), "the model's own"
    for wrong in ('{"temperature": -1}', '{"eos_token_id": "</s>"}'):
        (folder / "generation_config.json").write_text(wrong)
        with pytest.raises(ModelError, match=r"temperature|eos_token_id"):
            load_text(folder)


def test_a_beginning_of_a_stop_string_is_held_back_and_let_go_when_it_is_none() -> None:
    detokenizer = TEXT.detokenizer(["abcd", "bx"])
    seen = [detokenizer.push(TEXT.encode(text)) for text in ("1", "a", "b", "c", "2", "ab")]
    assert seen == ["1", "", "", "", "abc2", ""]
    assert (detokenizer.push(TEXT.encode("x")), detokenizer.stopped) == ("a", True)
    assert (detokenizer.push(TEXT.encode("y")), detokenizer.finish()) == ("", "")
    detokenizer = TEXT.detokenizer(["abcd"])
    assert (detokenizer.push(TEXT.encode("abc")), detokenizer.finish()) == ("", "abc")


def test_an_incomplete_character_is_held_back_to_its_last_byte() -> None:
    ids = [SENTENCE_PIECE._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é😀".encode()]
    detokenizer = SENTENCE_PIECE.detokenizer()
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "é", "", "", "", "😀"]
    assert (detokenizer.push(ids[:1]), detokenizer.finish(), detokenizer.finish()) == ("", "�", "")


def test_an_id_beyond_the_vocabulary_adds_nothing() -> None:
    assert TEXT.detokenizer().push([1 << 20, *TEXT.encode("x")]) == "x"
    assert (TEXT.decode([1 << 20]), TEXT.token_bytes(1 << 20)) == ("", b"")
