"""One random load for engines of every kind, over the oracle model, where every answer is known beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvasir.protocol.messages import Generate, Quota
from kvasir.protocol.sampling import Sampling
from tests.engine_helpers import SIZE, Rig, Stream, expected_tokens, make_generate, make_prompt

MAX_TOKENS = 25  # of an answer, at most


@dataclass
class Asked:
    """A request and what came of it."""

    command: Generate
    prompt: list[int]
    stream: Stream

    def check(self) -> None:
        """Compare the stream with the answer: all of it, or its beginning where something ended it before."""
        command, stream = self.command, self.stream
        answer = expected_tokens(self.prompt, command.max_tokens, command.sampling)
        for stop in command.stop_token_ids:
            answer = answer[: answer.index(stop) + 1] if stop in answer else answer
        if stream.finish_reason in ("length", "stop"):
            assert stream.token_ids == answer
            assert stream.finish_reason == ("stop" if answer[-1] in command.stop_token_ids else "length")
        else:
            assert stream.finish_reason in ("abort", "deadline") or "KV" in stream.error or "credits" in stream.error
            assert stream.token_ids == answer[: len(stream.token_ids)]
        assert stream.num_logprobs == (0 if command.sampling.logprobs is None else len(stream.token_ids))


def run_random_load(rig: Rig, dice: random.Random, count: int, *, has_quotas: bool = False) -> set[str | None]:
    """Put `count` prompts through `rig`, check every stream, and return how they ended.

    Prompts that begin alike, conversations that come back, two tenants, published beginnings, several choices of one
    prompt, stop ids, log probabilities, deadlines, requests that leave nothing, aborts; and changing quotas if asked.
    """
    longest = rig.engine.limits.max_context - MAX_TOKENS
    trunks = [make_prompt(dice.randrange(1, 26), salt=100 + i) for i in range(6)]
    asked: list[Asked] = []
    for i in range(count):
        if has_quotas and dice.random() < 0.2:
            rig.cache.set_quotas({t: Quota(dice.randrange(4), dice.choice([None, 7, 12])) for t in "ab"})
        tenant, prompt = dice.choice("ab"), dice.choice(trunks) + make_prompt(dice.choice([0, 0, 3]), salt=i)
        ended = [one for one in asked if one.stream.finish_reason in ("length", "stop")]
        if ended and dice.random() < 0.4:
            before = dice.choice(ended)
            tenant, prompt = before.command.tenant, before.prompt + before.stream.token_ids + make_prompt(2, salt=i)
        prompt = prompt[:longest]
        num_public = dice.choice([0, 0, 1, 2]) if len(prompt) >= 2 * SIZE else 0
        for j in range(dice.choice([1, 1, 1, 3])):
            sampling = Sampling(
                temperature=dice.choice([0.0, 0.7]), seed=dice.randrange(9), logprobs=dice.choice([None, 2])
            )
            max_tokens = dice.randrange(1, MAX_TOKENS)
            answer = expected_tokens(prompt, max_tokens, sampling)
            command = make_generate(
                prompt,
                max_tokens,
                req_id=b"%d-%d" % (i, j),
                tenant=tenant,
                num_public=num_public,
                sampling=sampling,
                stop_token_ids=dice.choice([[], [dice.choice(answer)]]),
                deadline_s=dice.choice([None, None, None, 0.5]),
                no_store=dice.random() < 0.1,
            )
            asked.append(Asked(command, prompt, rig.submit(command)))
        for _ in range(dice.randrange(6)):
            rig.clock.now += 0.05
            rig.step()
        if dice.random() < 0.15:
            rig.engine.abort(dice.choice(asked).command.req_id, 1)
    rig.run()
    for one in asked:
        one.check()
    return {one.stream.finish_reason for one in asked}
