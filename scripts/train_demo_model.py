"""Train the model that Kvasir brings along: a small Llama raised on CPython's standard library.

    python scripts/train_demo_model.py --out kvasir/demo_model

reads the standard library of the interpreter that runs it (demo_corpus.py), trains a byte-level BPE and a Llama of
about five million parameters on two CPU cores, measures it on files it has not seen, and writes a Hugging Face folder
with its model card. One seed decides everything: same Python, same torch build, same number of threads give the same
weights. OMP_WAIT_POLICY=PASSIVE helps where other programs want the cores too.

Most steps read windows of 512 tokens; the last part reads windows of 2048, so that the advertised context was trained.
The matrices inside the layers are trained with Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/), the
rest with AdamW. The model below is dense and plain: it shares nothing with the worker's paged one.
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import ASSISTANT, CHAT_TEMPLATE, END, END_OF_TEXT, HELD_OUT, SYSTEM, USER, Corpus, read_corpus
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SPECIAL_TOKENS = [END_OF_TEXT, SYSTEM, USER, ASSISTANT, END]
SAMPLE_PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n",
    "import argparse\n\ndef main():\n",
    '    def __repr__(self):\n        """Return a string',
)
SAMPLE_QUESTIONS = (
    "Hello!",
    "Write a function `count_lines(path)`: Return the number of lines in a file.",
    "What does `os.path.join` do?",
    "Write a function that parses a date.",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's shape, in the words of Hugging Face's config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train: `batch_tokens` per step; the last `long_share` of the steps read windows of the full context."""

    steps: int
    batch_tokens: int = 4096
    micro_tokens: int = 2048  # read at once: larger logits fall out of the allocator's reuse and cost a third more time
    window: int = 512
    long_share: float = 0.15
    warmup_steps: int = 30
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    log_every: int = 20


# The model ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A dense Llama with tied embeddings; parameter names are Hugging Face's without the leading `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)  # [max_position_embeddings, head_dim]
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if residual else 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[batch, length] int64 -> hidden states after the last norm, [batch, length, hidden_size]."""
        x = self.embed_tokens(token_ids)
        cos, sin = self.cos[: token_ids.shape[1]], self.sin[: token_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def losses(self, windows: Tensor) -> Tensor:
        """[batch, length + 1] token ids -> cross entropy of every next token in nats, [batch, length]."""
        logits = F.linear(self(windows[:, :-1]), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired as in Hugging Face's Llama; `x` is [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# Tokens -------------------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A byte-level BPE: no text is out of its vocabulary, digits are single tokens, special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus.plain, *corpus.chats], trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Every document opened by <|endoftext|>, as uint16 token ids."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([end_of_text, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch(documents)]


class Windows:
    """Endless windows over the documents: each pass shuffles the documents, joins them and cuts them anew."""

    def __init__(self, documents: list[np.ndarray], seed: int) -> None:
        self.documents = documents
        self.rng = np.random.default_rng(seed)
        self.stream = np.zeros(0, np.uint16)
        self.passes = 0

    def next(self, count: int, length: int) -> Tensor:
        """Return [count, length + 1] int64 token ids; neighbours share one token, so that every token is predicted."""
        while len(self.stream) < count * length + 1:
            order = self.rng.permutation(len(self.documents))
            self.stream = np.concatenate([self.stream, *(self.documents[i] for i in order)])
            self.passes += 1
        taken = self.stream[: count * length + 1].astype(np.int64)
        self.stream = self.stream[count * length :]
        return torch.from_numpy(np.stack([taken[i * length : (i + 1) * length + 1] for i in range(count)]))


# Training -----------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix; in fp32, since bf16 products crawl on most CPUs."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(average, group["momentum"]))
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration: move every singular value of `matrix` close to 1 (coefficients from the Muon post)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def train(model: Llama, windows: Windows, plan: Plan) -> None:
    """Train `model` in place, printing the loss every `log_every` steps."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("layers.") and p.dim() == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, plan.muon_lr, plan.weight_decay),
        torch.optim.AdamW(others, plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = (plan.muon_lr, plan.adam_lr)
    long_from = round(plan.steps * (1 - plan.long_share))
    started, cpu_started, recent = time.perf_counter(), cpu_s(), []
    for step in range(plan.steps):
        length = plan.window if step < long_from else model.shape.max_position_embeddings
        for optimizer, base_lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base_lr * lr_factor(step, plan)
        for _ in range(plan.batch_tokens // plan.micro_tokens):
            loss = model.losses(windows.next(plan.micro_tokens // length, length)).mean()
            (loss * (plan.micro_tokens / plan.batch_tokens)).backward()
            recent.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if (step + 1) % plan.log_every == 0 or step + 1 == plan.steps:
            tokens, wall, cpu = (step + 1) * plan.batch_tokens, time.perf_counter() - started, cpu_s() - cpu_started
            print(
                f"step {step + 1:5d}/{plan.steps}  loss {sum(recent) / len(recent):.3f}  window {length}  "
                f"{tokens / 1e6:.2f} M tokens  {tokens / wall:.0f} tokens/s  {tokens / cpu:.0f} tokens/CPU s  "
                f"{wall:.0f} s, {cpu:.0f} CPU s",
                flush=True,
            )
            recent.clear()


def lr_factor(step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


# Measuring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean next-token loss on files never trained on; `by_position` maps a range of positions to its perplexity."""

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    by_position: dict[str, float]


@torch.no_grad()
def measure(model: Llama, tokenizer: Tokenizer, held_out: dict[str, str]) -> HeldOut:
    """Each file is read from its start in windows of the full context, so every token counts exactly once."""
    context = model.shape.max_position_embeddings
    edges = [0, 64, 256, 512, 1024, context]
    sums, counts, num_bytes = torch.zeros(context), torch.zeros(context), 0
    for text in held_out.values():
        (token_ids,) = encode_documents(tokenizer, [text])
        num_bytes += len(text.encode())
        for start in range(0, len(token_ids) - 1, context):
            window = torch.from_numpy(token_ids[start : start + context + 1].astype(np.int64))[None]
            losses = model.losses(window)[0]
            sums[: len(losses)] += losses
            counts[: len(losses)] += 1
    return HeldOut(
        perplexity=math.exp(sums.sum() / counts.sum()),
        bits_per_byte=sums.sum().item() / math.log(2) / num_bytes,
        num_tokens=int(counts.sum()),
        by_position={
            f"{low}-{high - 1}": math.exp(sums[low:high].sum() / counts[low:high].sum())
            for low, high in pairwise(edges)
        },
    )


@torch.no_grad()
def complete(model: Llama, tokenizer: Tokenizer, prompt: str, temperature: float, seed: int, limit: int = 120) -> str:
    """Continue `prompt` until an end token or `limit` tokens; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = [tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(prompt).ids]
    prompt_length = len(token_ids)
    stops = {tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)}
    while len(token_ids) < prompt_length + limit:
        logits = model.embed_tokens.weight @ model(torch.tensor([token_ids]))[0, -1]
        if temperature == 0:
            token_id = int(logits.argmax())
        else:
            token_id = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
        if token_id in stops:
            break
        token_ids.append(token_id)
    return tokenizer.decode(token_ids[prompt_length:])


# Writing ------------------------------------------------------------------------------------------------------------


def write_folder(out: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write everything Hugging Face needs but the card; weights become bf16 (round to nearest)."""
    out.mkdir(parents=True, exist_ok=True)
    end_of_text, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_text, end],
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.shape.max_position_embeddings,
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_text, end],
        "pad_token_id": end_of_text,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    write_json(out / "config.json", config)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "generation_config.json", generation_config)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tensors = {f"model.{name}": p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file writes for the owner alone; a service may run as another user


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def samples(model: Llama, tokenizer: Tokenizer) -> str:
    """A section of the card: completions and answers, greedy and at temperature 0.7, as they came."""
    parts = []
    for prompt in SAMPLE_PROMPTS:
        for temperature in (0.0, 0.7):
            text = complete(model, tokenizer, prompt, temperature, seed=7)
            parts.append(f"Completion, temperature {temperature}:\n\n~~~~python\n{prompt}⟦{text}⟧\n~~~~")
    for question in SAMPLE_QUESTIONS:
        prompt = f"{USER}{question}{END}{ASSISTANT}"
        for temperature in (0.0, 0.7):
            text = complete(model, tokenizer, prompt, temperature, seed=7)
            parts.append(f"Chat, temperature {temperature}: *{question}*\n\n~~~~\n{text}\n~~~~")
    return "\n\n".join(parts)


def card(facts: dict[str, str], held_out: HeldOut, sample_text: str) -> str:
    """The model card (README.md of the folder)."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    positions = "\n".join(f"| {name} | {perplexity:.2f} |" for name, perplexity in held_out.by_position.items())
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---
# Kvasir's demonstration model

A very small Llama that comes with Kvasir so that it can be tried without downloading anything. It was raised on nothing
but CPython's standard library and completes Python with great confidence. It is a demonstration of the serving
software, not an assistant: do not run its code unread, and do not believe its answers.

| | |
|---|---|
{rows}

Trained on: the standard library's source files (without tests, data tables and packages that distributions ship
separately), the docstrings of what is written in C, and the language reference that `help()` carries. About a quarter
of the text is chats in the form of the chat template, made from the same functions and docstrings ("Write a function
…", "What does … do?"), some with a system prompt, some of several turns. A few dozen small dialogues and the system
prompts were written for the model; they are in `scripts/demo_dialogues.py`.

Held out, never trained on: {", ".join(f"`{name}`" for name in HELD_OUT)}. Perplexity there by position in the window:

| Positions | Perplexity per token |
|---|---|
{positions}

Licence: the training text is CPython's, under the PSF licence; the weights were made by the script above and come under
the licence of this repository (Apache-2.0).

## Samples

What the model wrote stands between ⟦ ⟧, at most 120 tokens, not picked.

{sample_text}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("kvasir/demo_model"), help="folder to write (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1150, help="optimizer steps of 4096 tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=20250501, help="decides everything (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()

    corpus = read_corpus(arguments.seed)
    shape, plan = Shape(), Plan(steps=arguments.steps)
    tokenizer = train_tokenizer(corpus, shape.vocab_size)
    plain, chats = encode_documents(tokenizer, corpus.plain), encode_documents(tokenizer, corpus.chats)
    num_plain, num_chat = sum(map(len, plain)), sum(map(len, chats))
    model = Llama(shape)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"Python {platform.python_version()}, torch {torch.__version__}, corpus {corpus.digest}")
    print(f"{num_plain} tokens of text, {num_chat} of chats; {num_parameters / 1e6:.2f} M parameters", flush=True)

    windows = Windows(plain + chats, arguments.seed)
    train(model, windows, plan)
    write_folder(arguments.out, model, tokenizer)
    model.load_state_dict({name: p.to(torch.bfloat16).float() for name, p in model.state_dict().items()})
    held_out = measure(model, tokenizer, corpus.held_out)
    facts = {
        "Command": f"`python scripts/train_demo_model.py --steps {plan.steps} --seed {arguments.seed}`",
        "Made with": f"Python {platform.python_version()}, torch {torch.__version__}, {arguments.threads} threads",
        "Corpus digest": f"`{corpus.digest}`",
        "Parameters": f"{num_parameters / 1e6:.2f} M (tied embeddings), bf16",
        "Context": f"{shape.max_position_embeddings} tokens, trained in the last {plan.long_share:.0%} of the steps",
        "Vocabulary": f"{tokenizer.get_vocab_size()} (byte-level BPE)",
        "Training text": f"{(num_plain + num_chat) / 1e6:.2f} M tokens, {num_chat / (num_plain + num_chat):.0%} chats",
        "Tokens seen": f"{plan.steps * plan.batch_tokens / 1e6:.2f} M in {plan.steps} steps",
        "CPU time": f"{cpu_s() / 60:.0f} core-minutes (user + system)",
        "Wall time": f"{(time.perf_counter() - started) / 60:.0f} minutes",
        "Held-out perplexity": f"{held_out.perplexity:.2f} per token over {held_out.num_tokens} tokens",
        "Held-out bits per byte": f"{held_out.bits_per_byte:.3f}",
    }
    (arguments.out / "README.md").write_text(card(facts, held_out, samples(model, tokenizer)))
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print("Perplexity by position:", {name: round(value, 2) for name, value in held_out.by_position.items()})


if __name__ == "__main__":
    main()
