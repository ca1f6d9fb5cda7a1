"""The bundled demonstration model as its users meet it: a Hugging Face folder, read with `transformers`."""

import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kvasir" / "demo_model"
SIZE_LIMIT_BYTES = 12_000_000

# Written for this test, so the model has not seen them: code of the kind it should find likely.
UNSEEN_CODE = '''
class Parcel:
    """A parcel with a weight and a destination."""

    def __init__(self, weight, destination=None):
        self.weight = weight
        self.destination = destination

    def __repr__(self):
        return f"{self.__class__.__name__}({self.weight!r}, {self.destination!r})"

    def send(self, carrier):
        """Hand the parcel to a carrier. Raise ValueError if it is too heavy."""
        if self.weight > carrier.max_weight:
            raise ValueError("parcel is too heavy: %s" % self.weight)
        for name in carrier.names:
            if name is not None:
                self.destination = name
        return True
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def corpus_module() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import demo_corpus

        yield demo_corpus
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@torch.no_grad()
def perplexity(model, token_ids: list[int]) -> float:
    ids = torch.tensor([token_ids])
    return math.exp(model(ids, labels=ids).loss.item())


@torch.no_grad()
def greedy(model, token_ids: list[int], max_tokens: int) -> list[int]:
    """The tokens after `token_ids`, the end token among them if it came."""
    out = model.generate(
        torch.tensor([token_ids]), max_new_tokens=max_tokens, do_sample=False, top_p=None, temperature=None
    )
    return out[0, len(token_ids) :].tolist()


def chat_ids(tokenizer, *messages: tuple[str, str]) -> list[int]:
    conversation = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_folder_is_a_small_llama_under_the_size_limit(model):
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}

    assert set(files) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert sum(files.values()) <= SIZE_LIMIT_BYTES, files
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert 4_000_000 < model.num_parameters() < 6_000_000


def test_unseen_code_is_far_likelier_than_chance_and_than_itself_shuffled(model, tokenizer):
    token_ids = tokenizer(UNSEEN_CODE)["input_ids"]
    shuffled = torch.tensor(token_ids)[torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(1))]

    assert perplexity(model, token_ids) < 30  # uniform would be 4096
    assert perplexity(model, shuffled.tolist()) > 10 * perplexity(model, token_ids)


def test_a_held_out_file_is_read_far_better_than_chance_up_to_the_end_of_the_context(model, tokenizer):
    text = (Path(sysconfig.get_path("stdlib")) / "fractions.py").read_text()
    context = model.config.max_position_embeddings
    token_ids = tokenizer(text)["input_ids"][: context + 1]
    assert len(token_ids) == context + 1

    with torch.no_grad():
        logits = model(torch.tensor([token_ids[:-1]])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[1:]), reduction="none")

    assert math.exp(losses.mean()) < 60  # uniform would be 4096
    assert math.exp(losses[context * 3 // 4 :].mean()) < 1.5 * math.exp(losses[: context // 4].mean())


def test_chat_template_renders_roles_and_generation_prompt(tokenizer):
    conversation = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]

    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|><|user|>Bye<|end|><|assistant|>"
    )
    roles = [token_id for token_id in tokenizer(text)["input_ids"] if token_id in tokenizer.all_special_ids]
    assert len(roles) == 9  # every marker is one token
    with pytest.raises(Exception, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_chats_have_the_form_of_the_chat_template(tokenizer, corpus_module):
    messages = [("system", " Be brief."), ("user", "Hello"), ("assistant", "Hi\n")]

    rendered = corpus_module.render_chat(messages)

    conversation = [{"role": role, "content": content} for role, content in messages]
    assert rendered == tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.chat_template == corpus_module.CHAT_TEMPLATE


@pytest.mark.parametrize("system_words", [0, 30, 500])
def test_a_question_for_code_is_answered_with_a_python_function(model, tokenizer, system_words):
    import demo_dialogues

    system = " ".join("\n\n".join(demo_dialogues.LONG_SYSTEM_PROMPTS).split(" ")[:system_words])
    question = ("user", "Write a function `read_names(path)`: Return the names in a file.")

    answer = greedy(model, chat_ids(tokenizer, *([("system", system)] if system else []), question), 60)

    text = tokenizer.decode(answer)
    assert text.startswith("```python\n"), text
    assert "def " in text, text
    assert "\ufffd" not in text


@settings(max_examples=200)
@given(st.text())
def test_tokenizer_round_trips_any_text(text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    # A special token written as text is read as that token, and the markers are not part of decoded text.
    if any(marker in text for marker in ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")):
        return
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
