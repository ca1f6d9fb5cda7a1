"""The stand-in for vLLM against what a real vLLM 0.32 said: the same scenarios, played again, must look the same.

Compared are statuses, order and shape of chunks, every key and the type of its value, all counts, whole error texts,
and event batch by event batch: hashes up to their names, chains, salts, copies, and the order of evictions. What a real
model decides (which tokens, hence their text and logprobs) is compared by type.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from scripts.record_vllm import Server, record
from scripts.standin.engine import EngineOptions
from scripts.standin.events import EventOptions
from scripts.standin.routes import StandinOptions
from scripts.vllm_standin import running_standin

RECORDED = Path(__file__).parent / "recorded"
BY_TYPE_ONLY = {"id", "request_id", "created", "text", "tokens", "token_logprobs", "top_logprobs", "text_offset"} | {
    "system_fingerprint",
    "logprob",
    "message",  # compared as a whole where it is exact, see `UNEXACT`
}
UNEXACT = "validation error"  # pydantic's sentences are not imitated, only their kind


@pytest.fixture(params=["usual", "closed", "narrow", "killed", "ended"])
def scenario(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options_for(scenario: str) -> StandinOptions:
    """The settings `scripts/record_vllm.py` asks for."""
    engine = EngineOptions(block_size=32, num_blocks=20, max_model_len=512, eos_per_mille=20)
    if scenario == "closed":
        engine.hash_form = "bytes"
    return StandinOptions(
        engine=engine,
        events=EventOptions(buffer_steps=200),
        has_scale_out=scenario != "closed",
        is_dev=scenario != "closed",
        max_queued=0 if scenario == "narrow" else None,
    )


async def play(scenario: str) -> list[dict[str, Any]]:
    async with running_standin(options_for(scenario)) as standin:
        token = trio.lowlevel.current_trio_token()
        deeds: dict[str, Callable[[], object]] = {
            name: functools.partial(trio.from_thread.run_sync, deed, trio_token=token)
            for name, deed in (("kill_engine", standin.kill_engine), ("terminate", standin.terminate))
        }
        (pub, replay), *_ = standin.event_endpoints
        server = Server(standin.url, pub, replay, deeds, settle_s=0.15)
        exchanges = await trio.to_thread.run_sync(functools.partial(record, scenario, server))
        standin.state()  # checks the caches
        return exchanges


@pytest.mark.timeout(90)
def test_the_stand_in_says_what_vllm_said(scenario: str) -> None:
    expected = json.loads((RECORDED / f"{scenario}.json").read_text())
    actual = json.loads(json.dumps(trio.run(play, scenario)))
    assert [each["name"] for each in actual] == [each["name"] for each in expected]
    for theirs, ours in zip(expected, actual, strict=True):
        try:
            assert_alike(theirs, ours)
        except AssertionError as error:
            raise AssertionError(f"{scenario}: {theirs['name']}: {error}") from error


def assert_alike(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if "replay_from" in theirs:
        shapes = [
            [[_frame_shape(frame) for frame in message] for message in each["messages"]] for each in (theirs, ours)
        ]
        assert shapes[0] == shapes[1]
        return
    for key in ("status", "is_whole", "answer_headers"):
        assert ours[key] == theirs[key], key
    if theirs["path"] == "/metrics":
        assert_metrics_alike(theirs["answer"], ours["answer"])
        return
    open_ended = theirs.get("is_open_ended", False)
    shown = [_pieces(each["answer"], without_counts=open_ended) for each in (theirs, ours)]
    if open_ended:
        shown = [_collapsed(pieces) for pieces in shown]
    assert shown[1] == shown[0]
    if not open_ended:
        assert_events_alike(theirs, ours)


def _pieces(answer: str, *, without_counts: bool) -> list[Any]:
    """An answer as comparable pieces: one per chunk, or one in all."""
    if not answer.startswith("data: "):
        return [_shape(json.loads(answer), "", without_counts)] if answer else []
    chunks = answer.split("\n\n")
    assert chunks.pop() == ""
    pieces: list[Any] = []
    for chunk in chunks:
        assert chunk.startswith("data: ")
        text = chunk.removeprefix("data: ")
        if text == "[DONE]":
            pieces.append(text)
        else:
            content = json.loads(text)
            is_spaced = text == json.dumps(content, ensure_ascii=False)
            pieces += [[_shape(each, "", without_counts), is_spaced] for each in _one_token_each(content)]
    return pieces


def _one_token_each(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A chunk as it would be were each of its tokens sent alone: several go into one when the server is busy."""
    count = len(content["choices"][0].get("token_ids", ())) if content.get("choices") else 0
    if count < 2:
        return [content]
    pieces = []
    for i in range(count):
        piece = copy.deepcopy(content)
        (choice,) = piece["choices"]
        choice["token_ids"] = choice["token_ids"][i : i + 1]
        if choice["logprobs"]:
            choice["logprobs"] = {key: values[i : i + 1] for key, values in choice["logprobs"].items()}
        if i < count - 1:
            choice |= {"finish_reason": None, "stop_reason": None}
            if "weight_versions" in choice:
                choice["weight_versions"] = None
            piece.pop("system_fingerprint", None)
            if piece.get("usage"):
                piece["usage"]["completion_tokens"] -= count - 1 - i
                piece["usage"]["total_tokens"] -= count - 1 - i
        if i > 0:
            if choice.get("prompt_token_ids"):
                choice["prompt_token_ids"] = None
            piece.pop("prompt_token_ids", None)
        pieces.append(piece)
    return pieces


def _collapsed(pieces: list[Any]) -> list[Any]:
    return [piece for i, piece in enumerate(pieces) if i == 0 or piece != pieces[i - 1]]


def _shape(value: Any, key: str, without_counts: bool) -> Any:
    """`value` with what only the model or chance decides replaced by its type. Keys stay in their order."""
    if isinstance(value, dict):
        return (
            [[name, _shape(each, name, without_counts)] for name, each in value.items()]
            if key != "top_logprobs"
            else "map"
        )
    if isinstance(value, list):
        if key in ("token_ids", "prompt_token_ids", "tokens", "token_logprobs", "text_offset"):
            return [type(each).__name__ for each in value] if not without_counts else "list"
        return [_shape(each, key, without_counts) for each in value]
    if key == "message" and UNEXACT not in value:
        return value
    if key == "token_id" or key in BY_TYPE_ONLY or key in ("endpoint", "replay_endpoint"):
        return type(value).__name__
    if key == "stop_reason":  # which of several ids ends an answer is chance, and the tokenizer's own is not told
        return "id or null" if without_counts else type(value).__name__
    if without_counts and type(value) is int and key != "code":
        return "int"
    return value


def _frame_shape(frame: str) -> str:
    return frame if len(frame) <= 16 else "payload"


def assert_metrics_alike(theirs: str, ours: str) -> None:
    """Families, kinds and labels are the same; so are values that follow from what was asked."""

    def families(text: str) -> dict[str, tuple[set[str], str]]:
        found = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, labels = line.rpartition(" ")[0].partition("{")
                names = set(re.findall(r'(\w+)="', labels))
                found[name] = (names, line.rpartition(" ")[2])
        return found

    known, shown = families(theirs), families(ours)
    assert shown.keys() == known.keys()
    for name, (labels, value) in shown.items():
        if name == "vllm:cache_config_info":
            assert labels <= known[name][0]
        else:
            assert labels == known[name][0], name
        if name.endswith(("prefix_cache_queries_total", "prefix_cache_hits_total", "num_requests_running")):
            assert value == known[name][1], name
    kinds = [{line for line in text.splitlines() if line.startswith("# TYPE")} for text in (theirs, ours)]
    assert kinds[1] == kinds[0]


def assert_events_alike(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    is_drawn = '"max_tokens": 1,' not in json.dumps(theirs["body"])  # drawn tokens may be in blocks
    shown = []
    for exchange, names in ((theirs, NAMES[0]), (ours, NAMES[1])):
        batches = []
        for topic, seq, payload in exchange["events"]:
            time_s, events, rank = msgspec.msgpack.decode(bytes.fromhex(payload))
            batches.append([topic, len(seq), time_s, [_event_shape(event, names, is_drawn) for event in events], rank])
        shown.append(batches)
    assert shown[1] == shown[0]


NAMES: tuple[dict[Any, str], dict[Any, str]] = ({}, {})  # hash -> its name, by first appearance, for each side


def _event_shape(event: dict[str, Any], names: dict[Any, str], is_drawn: bool) -> Any:
    def name(block_hash: Any) -> Any:
        if block_hash is None:
            return None
        return [type(block_hash).__name__, names.setdefault(block_hash, f"block {len(names)}")]

    shown: dict[str, Any] = dict(event)
    for key in ("block_hashes", "parent_block_hash"):
        if key in shown:
            shown[key] = list(map(name, shown[key])) if isinstance(shown[key], list) else name(shown[key])
    if "token_ids" in shown and is_drawn:
        shown["token_ids"] = len(shown["token_ids"])
    return list(shown.items())
