"""The masks of drafts are those that would come if the drafts were drawn, and looking at them changes nothing."""

from __future__ import annotations

import random

import pytest

from kvasir.protocol.grammars import make_matcher
from kvasir.protocol.sampling import ReasoningBudget
from kvasir.worker.grammars.answer_matcher import AnswerMatcher
from tests.grammar_helpers import EOS, TOKENIZER, VOCAB, schema_grammar

GRAMMAR = schema_grammar({"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]})
TEXT = list(TOKENIZER.tokenize_bytes(b'{"on": true}'))
END, START = 12, 11


def make(reasoning: ReasoningBudget | None, output_ids: list[int]) -> AnswerMatcher:
    matcher = AnswerMatcher(reasoning, EOS, VOCAB)
    matcher.begin(make_matcher(TOKENIZER, GRAMMAR), output_ids)
    return matcher


@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        (None, TEXT),
        (ReasoningBudget(END), [50, 51, 50, END, *TEXT]),
        (ReasoningBudget(END, start=START), [START, 50, END, *TEXT]),
        (ReasoningBudget(END, start=START), TEXT),
    ],
)
def test_masks_of_drafts_are_those_that_would_come(reasoning: ReasoningBudget | None, answer: list[int]) -> None:
    dice = random.Random(len(answer))
    for num_known in range(len(answer)):
        known, rest = answer[:num_known], answer[num_known:]
        drafts = rest[: dice.randrange(len(rest) + 1)]
        wrong = [*drafts, 2000, 2001, *rest]
        matcher = make(reasoning, known)
        for draft_ids in (drafts, wrong):
            masks = matcher.masks(draft_ids)
            assert len(masks) == len(draft_ids) + 1
            for i, mask in enumerate(masks[: len(drafts) + 1]):
                there = make(reasoning, known + draft_ids[:i])
                assert mask == (None if i and there.is_complete else there.mask())
        assert not matcher.error and matcher.mask() == make(reasoning, known).mask()
        for token_id in rest:
            matcher.accept(token_id)
        assert matcher.is_complete and not matcher.error
