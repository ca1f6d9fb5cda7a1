"""What may be asked of one request: how its tokens are drawn, what its answer must match, what is kept of it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from kvasir.protocol.codec import MAX_TOKENS, Count, Seconds, TokenId

MAX_ALLOWED_IDS = 8192
MAX_BAD_WORDS = 128
MAX_GRAMMAR_CHARS = 65_536


class ReasoningBudget(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Reasoning that has not ended with the token `end` after `max_tokens` tokens is ended. It begins after the token
    `start`; None: with the answer."""

    end: TokenId
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = MAX_TOKENS
    start: TokenId | None = None


class Grammar(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer has to match. `text`: a JSON schema, a regular expression, a JSON list of texts, a grammar in
    Lark's notation, or a `CallGrammar` in JSON."""

    kind: Literal["json_schema", "regex", "choice", "lark", "calls"]
    text: Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class Constraint(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which tokens may be drawn: no stop token among the first `min_tokens`; only `allowed_token_ids` if there are any;
    never the last token of one of `bad_words` where the tokens before it were just generated.

    Where all this together leaves nothing, `allowed_token_ids` alone count; where `reasoning` ends, nothing else does.
    The answer matches `grammar` in any case: all of it, or what comes after the reasoning if `reasoning` says where
    that ends. It is over with reason "stop" as soon as nothing more can follow.
    """

    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ALLOWED_IDS)] = []
    bad_words: Annotated[
        list[Annotated[list[TokenId], Meta(min_length=1, max_length=1024)]], Meta(max_length=2 * MAX_BAD_WORDS)
    ] = []
    reasoning: ReasoningBudget | None = None
    grammar: Grammar | None = None


class _Drawing(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What `Sampling` and `SamplingOptions` share. `logprobs`: None = none, n = the chosen token's and the n best.

    Presence and frequency penalties look at generated tokens, the repetition penalty at prompt and generated ones.
    """

    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] = {}
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class Sampling(_Drawing, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are drawn. Temperature 0 is greedy; `seed` and the token's position decide every draw.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    """

    constraint: Constraint | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0


class SamplingOptions(_Drawing, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`Sampling` as a client asks for it: None is the model's own default (its `generation_config.json`).

    `min_tokens`, `allowed_token_ids` and `bad_words` (texts here) become the `Constraint`.
    """

    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ALLOWED_IDS)] = []
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=MAX_BAD_WORDS)] = []
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None


class RetentionHint(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Keep the blocks of tokens `start` to `end` (None: to the end) of a request: the higher `priority` (0 to 100), the
    longer, for `duration_s` (None: for good). Bounded by the tenant's own floor and cap: see `Generate`."""

    start: Count = 0
    end: Count | None = None
    priority: Annotated[int, Meta(ge=0, le=100)] = 50
    duration_s: Seconds | None = None


Priority = Literal["low", "normal", "high"]
CacheHint = Literal["one_shot", "open", "closing"]
"""What a client may say about a request: nothing follows it, the conversation goes on, this was its last turn."""
