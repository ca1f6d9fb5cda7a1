"""Workers die under load; clients must not notice more than a pause."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from kvasir import Client
from tests.box import DEMO_MODEL, Box, open_box

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

OPTIONS = "--deterministic --kv-memory 256M"
NUM_STREAMS = 16
NUM_TOKENS = 64
NUM_KILLS = 6


def run_streams(box: Box, key: str, on_token=lambda: None) -> list[list[int]]:
    """Run all streams at once and return their tokens; even ones greedy, odd ones seeded."""
    results: list[list[int]] = [[] for _ in range(NUM_STREAMS)]
    failures: list[BaseException] = []

    def one(index: int) -> None:
        try:
            with Client(box.client_endpoint, key, timeout_s=90) as client:
                prompt = [(index * 37 + j * 11) % 3000 + 260 for j in range(40 + index)]
                stream = client.generate(
                    prompt,
                    max_tokens=NUM_TOKENS,
                    temperature=0.0 if index % 2 == 0 else 0.9,
                    seed=index,
                    ignore_eos=True,
                    stream=True,
                )
                for chunk in stream:
                    results[index] += chunk.token_ids
                    for _ in chunk.token_ids:
                        on_token()
                assert stream.result.usage.completion_tokens == len(results[index]) == NUM_TOKENS
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures
    return results


class Countdown:
    """Kills a process when so many tokens have reached the clients. `fired`: it has."""

    fired = False

    def __init__(self, num_tokens: int, victim: int) -> None:
        self._left = num_tokens
        self._victim = victim
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(self._victim, signal.SIGKILL)
                self.fired = True


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens of all streams where no worker dies and none drafts."""
    with open_box(workers=2, worker_args=f"{OPTIONS} --speculate off") as box:
        tokens = run_streams(box, box.key("alpha"))
        assert not any(worker["drafts"] for worker in box.workers())
        return tokens


def test_killing_workers_in_mid_stream_changes_no_token_of_any_stream(expected: list[list[int]]) -> None:
    """SIGKILLs at random points under 16 streams. float64 makes near-ties of logits practically impossible, since
    keys and values recomputed in another batch are equal only up to rounding (docs/architecture.md, "Identity")."""
    rng = random.Random(20)
    with open_box(workers=3, worker_args=OPTIONS) as box:
        key = box.key("alpha")
        for kill in range(NUM_KILLS):
            victim = rng.choice([worker["pid"] for worker in box.workers()])
            num_tokens = rng.randrange(1, NUM_STREAMS * NUM_TOKENS // 2)
            countdown = Countdown(num_tokens, victim)
            assert run_streams(box, key, countdown) == expected, f"kill {kill} after {num_tokens} tokens"
            assert countdown.fired
            box.wait_for_workers(3, but=victim)
        assert sum(worker["num_restarts"] for worker in box.workers()) == NUM_KILLS
        assert box.log().count("worker_exited") == NUM_KILLS == box.log().count("code=-9")
        assert box.log().count("Traceback") == 0


@pytest.mark.parametrize(
    ("proposer", "argument"),
    [("lookup", "--speculate lookup"), ("model", f"--draft-model {DEMO_MODEL}")],
    ids=["lookup", "model"],
)
def test_drafts_and_the_death_of_workers_that_compute_them_change_no_token(
    proposer: str, argument: str, expected: list[list[int]]
) -> None:
    rng = random.Random(21)
    with open_box(workers=2, worker_args=f"{OPTIONS} {argument}") as box:
        key = box.key("alpha")
        assert run_streams(box, key) == expected
        drafts = [each for worker in box.workers() for each in worker["drafts"] if each["proposer"] == proposer]
        # A model that drafts for itself is not worth its time, and soon left alone.
        assert sum(each["num_accepted"] for each in drafts) > (10 if proposer == "model" else NUM_TOKENS)
        for _ in range(2):
            victim = rng.choice([worker["pid"] for worker in box.workers()])
            countdown = Countdown(rng.randrange(1, NUM_STREAMS * NUM_TOKENS // 2), victim)
            assert run_streams(box, key, countdown) == expected
            assert countdown.fired
            box.wait_for_workers(2, but=victim)


def test_a_stopped_worker_is_noticed_by_its_step_counter_and_replaced(expected: list[list[int]]) -> None:
    with open_box(workers=2, worker_args=OPTIONS, extra=("--stall-s", "2")) as box:
        key = box.key("alpha")
        box.wait_for_workers(2)
        victim = box.workers()[0]["pid"]
        fired = threading.Event()

        def on_token() -> None:
            if not fired.is_set():
                fired.set()
                os.kill(victim, signal.SIGSTOP)

        begun = time.monotonic()
        assert run_streams(box, key, on_token) == expected
        assert time.monotonic() - begun < 60
        box.wait_for_workers(2)
        assert victim not in [worker["pid"] for worker in box.workers()]
