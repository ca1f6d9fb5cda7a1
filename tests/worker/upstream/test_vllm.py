"""vLLM's wire as recorded from a real server: what we read of it, and what we send."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvasir.protocol.errors import BadRequest, ConfigurationError
from kvasir.protocol.messages import Generate
from kvasir.protocol.sampling import Constraint, Grammar, ReasoningBudget, Sampling
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.upstream import vllm

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str, scenario: str = "usual") -> dict[str, Any]:
    found = [each for each in json.loads((RECORDED / f"{scenario}.json").read_text()) if each["name"] == name]
    assert len(found) == 1
    return dict(found[0])


def chunks(name: str, scenario: str = "usual") -> list[vllm.Chunk]:
    events = [part.removeprefix("data: ") for part in recorded(name, scenario)["answer"].split("\n\n") if part]
    assert events[-1] == vllm.DONE.decode()
    return [vllm.CHUNKS.decode(event) for event in events[:-1]]


def make_generate(sampling: Sampling | None = None, **more: Any) -> Generate:
    values: dict[str, Any] = {"token_ids": pack_tokens([1, 2, 3]), "num_prompt_tokens": 3, "max_tokens": 9, **more}
    return Generate(
        req_id=b"r",
        attempt=2,
        tenant="t",
        root=bytes(16),
        prefix_hashes=b"",
        num_public_tokens=0,
        namespace=bytes(range(16)),
        sampling=sampling or Sampling(),
        **values,
    )


def body_of(command: Generate, *, has_generate: bool = True, has_grammars: bool = True) -> Any:
    body = vllm.generate_body(command, "qwen", "id", has_generate=has_generate, has_grammars=has_grammars)
    return msgspec.json.decode(body)


def test_what_a_server_says_of_itself_is_read() -> None:
    model = vllm.read_models(recorded("/v1/models")["answer"].encode(), None)
    assert (model.id, model.max_context, model.lora) == ("demo", 512, None)
    sources = vllm.read_event_sources(recorded("/kv_event_sources")["answer"].encode())
    assert (sources[0].endpoint, sources[0].replay_endpoint, sources[0].topic) == ("tcp://*:5557", "tcp://*:5558", "kv")
    assert vllm.read_limits(recorded("/server_info?config_format=json")["answer"].encode()).max_num_seqs
    text = recorded("metrics of a server that has done nothing")["answer"]
    metrics, later = vllm.read_metrics(text, 0), vllm.read_metrics(recorded("metrics at the end")["answer"], 0)
    assert metrics.block_size == 32 and metrics.num_blocks == later.num_blocks > 0
    assert float(metrics.started_at) == float(later.started_at) > 1e9 and metrics.progress != later.progress
    assert vllm.read_ranks(text) == [0]


def metrics_with(**figures: str) -> str:
    """Return a server's metrics with other values of some figures."""
    text = recorded("metrics of a server that has done nothing")["answer"]
    for name, value in figures.items():
        text, num_changed = re.subn(rf"^(\S*{name}(?:\{{[^}}]*\}})?) \S+$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert num_changed == 1
    return str(text)


def test_figures_that_cannot_be_are_brought_within_bounds_or_refused() -> None:
    text = metrics_with(num_requests_running="-5", num_requests_waiting="1e300", kv_cache_usage_perc="-Inf")
    metrics = vllm.read_metrics(text, 0)
    assert (metrics.num_running, metrics.num_waiting, metrics.cache_usage) == (0, 1 << 31, 0.0)
    with pytest.raises(ConfigurationError, match="do not tell"):
        vllm.read_metrics(metrics_with(num_requests_running="NaN"), 0)
    text = metrics_with(process_start_time_seconds="NaN")
    assert vllm.read_metrics(text, 0).started_at == vllm.read_metrics(text, 0).started_at, "no new server every second"


def test_ranks_are_numbers_and_no_more_than_a_server_can_have() -> None:
    line = 'vllm:num_requests_running{{engine="{}"}} 0.0'
    assert vllm.read_ranks("\n".join(line.format(rank) for rank in ("1", "0", "²", "x"))) == [0, 1]
    with pytest.raises(ConfigurationError, match="2000 ranks"):
        vllm.read_ranks("\n".join(line.format(rank) for rank in range(2000)))


def test_a_greedy_stream_is_tokens_then_an_end_then_what_was_cached() -> None:
    found = chunks("a greedy stream")
    tokens = [token for chunk in found for choice in chunk.choices for token in choice.token_ids or []]
    ends = [choice.finish_reason for chunk in found for choice in chunk.choices]
    assert len(tokens) == 3, "in one chunk or in several: a busy server puts them together"
    assert ends[-1] == "length" and not any(ends[:-1])
    assert found[-1].num_cached_tokens == 0 and all(chunk.num_cached_tokens is None for chunk in found[:-1])


@pytest.mark.parametrize(("name", "reason"), [("ended by a stop id", "stop"), ("ended by the model", "stop")])
def test_the_token_that_stopped_an_answer_is_its_last_one(name: str, reason: str) -> None:
    last = chunks(name)[-2].choices[0]
    assert last.finish_reason == reason and last.token_ids


def test_an_aborted_stream_ends_with_what_was_cached_and_one_without_a_token_does_not_know() -> None:
    found = chunks("aborted in mid-stream")
    assert found[-2].choices[0].finish_reason == "abort" and found[-1].num_cached_tokens is not None
    nothing = vllm.Chunk(usage=vllm.Usage(0, vllm.PromptDetails(0)))
    assert nothing.num_cached_tokens is None


@pytest.mark.parametrize("num_top", [0, 1, 2])
def test_log_probabilities_have_as_many_alternatives_as_were_asked_for(num_top: int) -> None:
    found = [choice for chunk in chunks(f"logprobs {num_top}") for choice in chunk.choices]
    for choice in found:
        entries = vllm.token_logprobs(choice, num_top)
        assert len(entries) == len(choice.token_ids or []) and all(len(entry.top) == num_top for entry in entries)
    if num_top:
        assert vllm.token_logprobs(found[0], num_top)[0].top[0][0] == (found[0].token_ids or [])[0]


@pytest.mark.parametrize("name", ["too long, stream", "beyond the vocabulary, stream", "too many logprobs, stream"])
def test_errors_come_as_events_with_a_code(name: str) -> None:
    [chunk] = chunks(name)
    assert chunk.error is not None and chunk.error.code == 400 and chunk.error.message


def test_a_killed_engine_is_an_error_event_of_500() -> None:
    error = chunks("the engine is killed", "killed")[-1].error
    assert error is not None and error.code == 500


def test_a_completions_stream_reads_like_the_other() -> None:
    found = chunks("completion, salted")
    assert all(choice.token_ids for chunk in found for choice in chunk.choices)
    assert found[-1].num_cached_tokens is not None


def test_the_salt_is_the_namespace_and_every_parameter_is_passed_on() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=5, logprobs=3, logit_bias={4: -2.0}
    )
    command = make_generate(sampling, stop_token_ids=[8], ignore_eos=True)
    body = body_of(command)
    assert (body["model"], body["request_id"], body["token_ids"], body["stream"]) == ("qwen", "id", [1, 2, 3], True)
    assert body["cache_salt"] == bytes(range(16)).hex()
    drawn = body["sampling_params"]
    assert drawn == {
        **{name: getattr(sampling, name) for name in vllm._PASSED_ON},
        "max_tokens": 9,
        "ignore_eos": True,
        "top_k": 7,
        "logit_bias": {"4": -2.0},
        "stop_token_ids": [8],
        "logprobs": 3,
        "detokenize": False,
    }
    del drawn["logprobs"]
    unscored = msgspec.structs.replace(command, sampling=msgspec.structs.replace(sampling, logprobs=None))
    other = body_of(unscored, has_generate=False)
    assert other["prompt"] == [1, 2, 3] and other["return_token_ids"] and other["cache_salt"] == body["cache_salt"]
    assert all(other[name] == value for name, value in drawn.items() if name != "detokenize")


def test_a_minimum_counts_what_earlier_attempts_have_delivered() -> None:
    sampling = Sampling(constraint=Constraint(min_tokens=5, allowed_token_ids=[7, 8]))
    command = make_generate(sampling, token_ids=pack_tokens([1, 2, 3, 7, 8]))
    drawn = body_of(command)["sampling_params"]
    assert (drawn["min_tokens"], drawn["allowed_token_ids"]) == (3, [7, 8])
    with pytest.raises(BadRequest, match="bad_words"):
        body_of(make_generate(Sampling(constraint=Constraint(bad_words=[[1]]))))
    with pytest.raises(BadRequest, match="grammar"):  # it must not be passed over
        body_of(make_generate(Sampling(constraint=Constraint(grammar=Grammar("regex", "a")))), has_grammars=False)


def test_a_grammar_goes_there_in_the_notation_that_only_a_backend_that_honours_all_of_it_reads() -> None:
    bounded = ReasoningBudget(5, 100, 6)
    for constraint, expected in (
        (Constraint(grammar=Grammar("regex", "a/b")), "%llguidance {}\nstart: /a\\/b/"),
        (Constraint(grammar=Grammar("choice", '["x", "y"]')), '%llguidance {}\nstart: "x" | "y"'),
        (Constraint(grammar=Grammar("lark", 'start: "a"')), '%llguidance {}\nstart: "a"'),
        (Constraint(grammar=Grammar("lark", 'root ::= "a"')), 'root ::= "a"'),
        (
            Constraint(grammar=Grammar("regex", "a"), reasoning=ReasoningBudget(5, start=6)),
            "%llguidance {}\nstart: (<[6]> /(.|\\n)*/ <[5]>)? answer\nanswer: /a/",
        ),
    ):
        command = make_generate(Sampling(constraint=constraint))
        body = body_of(command)
        assert body["sampling_params"]["structured_outputs"] == {"grammar": expected}
        body = body_of(command, has_generate=False)
        assert body["structured_outputs"] == {"grammar": expected}
    for constraint, named in (
        (Constraint(grammar=Grammar("regex", "a"), reasoning=bounded), "max_reasoning_tokens"),
        (Constraint(grammar=Grammar("lark", 'start: "a"'), reasoning=ReasoningBudget(5)), "of your own"),
        (Constraint(reasoning=ReasoningBudget(5)), "max_reasoning_tokens"),
        (Constraint(grammar=Grammar("json_schema", "{")), "no valid JSON"),
    ):
        with pytest.raises(BadRequest, match=named):
            body_of(make_generate(Sampling(constraint=constraint)))


def test_every_field_of_sampling_is_passed_on_translated_or_refused() -> None:
    changed: dict[str, Any] = {"logit_bias": {1: 1.0}, "logprobs": 1, "seed": 3, "temperature": 0.3, "top_k": 4}
    changed["constraint"] = Constraint(min_tokens=1)
    plain = body_of(make_generate())
    for name in Sampling.__struct_fields__:
        assert body_of(make_generate(Sampling(**{name: changed.get(name, 0.5)}))) != plain, name
    with pytest.raises(BadRequest, match="--enable-scale-out"):
        body_of(make_generate(Sampling(logprobs=1)), has_generate=False)


def test_a_model_is_found_by_name_or_as_the_only_one_and_a_lora_by_its_own() -> None:
    cards = [
        {"id": "base", "root": "/m", "max_model_len": 100},
        {"id": "lora", "root": "/l", "parent": "base"},
        {"id": "other", "root": "/o", "max_model_len": 50},
    ]
    body = json.dumps({"data": cards}).encode()
    assert vllm.read_models(json.dumps({"data": cards[:2]}).encode(), None).id == "base"
    lora = vllm.read_models(body, "lora")
    assert (lora.root, lora.max_context, lora.lora) == ("/l", 100, "lora")
    for wanted in (None, "none"):
        with pytest.raises(ConfigurationError, match="serves base, lora, other; name one"):
            vllm.read_models(body, wanted)
    with pytest.raises(ConfigurationError, match="does not tell max_model_len"):
        vllm.read_models(json.dumps({"data": [{"id": "x"}]}).encode(), None)


def test_metrics_of_several_ranks_are_told_apart_and_of_other_servers_refused() -> None:
    text = recorded("metrics of a server that has done nothing")["answer"]
    both = text + text.replace('engine="0"', 'engine="1"').replace('num_gpu_blocks="', 'num_gpu_blocks="9')
    assert vllm.read_ranks(both) == [0, 1]
    assert vllm.read_metrics(both, 1).num_blocks > vllm.read_metrics(both, 0).num_blocks
    with pytest.raises(ConfigurationError, match="of rank 2; is it a vLLM server"):
        vllm.read_metrics(both, 2)
