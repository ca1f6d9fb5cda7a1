"""`/metrics` against the grammar of Prometheus' text format, read by a parser of our own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from kvasir.gateway.admin.metrics import render_metrics
from kvasir.gateway.core.counters import Histogram, Totals
from kvasir.gateway.core.statistics import CoreStatistics, ModelStatistics
from kvasir.gateway.http.limits import HttpStatistics
from kvasir.gateway.ledger.writer import LedgerStatistics
from kvasir.protocol.admin_records import UsageInfo, WorkerInfo
from kvasir.protocol.messages import Drafts

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf'({_NAME})(?:\{{((?:{_NAME}="(?:[^"\\\n]|\\[\\"n])*",?)*)\}})? (\S+)')
_LABEL = re.compile(rf'({_NAME})="((?:[^"\\\n]|\\[\\"n])*)"')
_UNESCAPED = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


@dataclass
class Family:
    """One metric and its samples: (name, labels) -> value."""

    kind: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)


def parse(text: str) -> dict[str, Family]:
    """Parse strictly: HELP then TYPE once per family, its samples right after, no sample twice."""
    families: dict[str, Family] = {}
    helped = ""
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            assert helped not in families
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped
            families[name] = Family(kind)
        else:
            sample = _SAMPLE.fullmatch(line)
            assert sample, line
            name, labels, value = sample.groups()
            family = families[helped]
            assert name == helped or (family.kind == "histogram" and name.removeprefix(helped) in _HISTOGRAM), line
            found = {
                (key, re.sub(r"\\.", lambda m: _UNESCAPED[m[0]], raw)) for key, raw in _LABEL.findall(labels or "")
            }
            key = (name, frozenset(found))
            assert key not in family.samples
            family.samples[key] = float(value)
    return families


_HISTOGRAM = ("_bucket", "_sum", "_count")


def make_statistics(model: str = "demo", tenant: str = "t1", latencies: tuple[float, ...] = ()) -> CoreStatistics:
    histogram = Histogram()
    for latency in latencies:
        histogram.add(latency)
    shown = histogram.statistics()
    return CoreStatistics(
        is_draining=False,
        totals=Totals(num_dispatches=10**12 + 1, num_redispatches=4, num_lost={"stalled": 3}),
        models=[ModelStatistics(model, 1, 3, shown, shown)],
        workers=[WorkerInfo("w1", model, "ready", device="cuda", attention="gather: it differs")],
        tenants={tenant: UsageInfo(1, 2, 3, 4, 500, 60, 7, {"stop": 1})},
    )


def test_every_family_has_its_help_and_type_and_counters_are_called_total() -> None:
    http = HttpStatistics(num_open=3, by_status={200: 5, 404: 1})
    families = parse(render_metrics(make_statistics(), http).decode())
    assert all(name.startswith("kvasir_") for name in families)
    assert all(name.endswith("_total") == (family.kind == "counter") for name, family in families.items())
    answers = families["kvasir_http_responses_total"].samples
    assert answers["kvasir_http_responses_total", frozenset({("status", "404")})] == 1
    lost = families["kvasir_workers_lost_total"].samples
    assert lost["kvasir_workers_lost_total", frozenset({("cause", "stalled")})] == 3
    assert parse(render_metrics(make_statistics(), None).decode())


def test_a_worker_tells_what_it_computes_with() -> None:
    samples = parse(render_metrics(make_statistics(), None).decode())["kvasir_worker_info"].samples
    labels = {"worker": "w1", "model": "demo", "device": "cuda", "attention": "gather: it differs"}
    assert samples == {("kvasir_worker_info", frozenset(labels.items())): 1}


def test_drafts_are_counted_by_their_proposer() -> None:
    statistics = make_statistics()
    [worker] = statistics.workers
    drafting = structs.replace(worker, id="w2", drafts=[Drafts("model", 1, 2, 1), Drafts("lookup", 10, 40, 25)])
    families = parse(render_metrics(structs.replace(statistics, workers=[worker, drafting]), None).decode())
    for name, lookup, model in (("draft_runs", 10, 1), ("drafted_tokens", 40, 2), ("accepted_tokens", 25, 1)):
        samples = families[f"kvasir_worker_{name}_total"].samples
        found = {dict(labels)["proposer"]: value for (_, labels), value in samples.items()}
        assert found == {"lookup": lookup, "model": model}


def test_large_counters_are_exact() -> None:
    families = parse(render_metrics(make_statistics(), None).decode())
    assert list(families["kvasir_dispatches_total"].samples.values()) == [10**12 + 1]


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_labels_survive_whatever_names_there_are(model: str, tenant: str) -> None:
    families = parse(render_metrics(make_statistics(model, tenant), None).decode("utf-8"))
    assert ("kvasir_queued", frozenset({("model", model)})) in families["kvasir_queued"].samples
    assert ("kvasir_tenant_queued", frozenset({("tenant", tenant)})) in families["kvasir_tenant_queued"].samples


@given(st.lists(st.floats(0, 200), max_size=30))
def test_a_histogram_counts_up_to_all_of_its_values(latencies: list[float]) -> None:
    samples = parse(render_metrics(make_statistics(latencies=tuple(latencies)), None).decode())[
        "kvasir_ttft_seconds"
    ].samples
    buckets = {
        float(dict(labels)["le"]): count for (name, labels), count in samples.items() if name.endswith("_bucket")
    }
    for bound, count in buckets.items():
        assert count == sum(latency <= bound for latency in latencies)
    assert float("inf") in buckets
    assert samples["kvasir_ttft_seconds_count", frozenset({("model", "demo")})] == len(latencies)


def test_the_ledger_says_whether_it_can_be_written() -> None:
    core = CoreStatistics(False, Totals(), [], [], {})
    families = parse(render_metrics(core, None, LedgerStatistics(False, 7, 3)).decode())
    values = {name: list(families[f"kvasir_ledger_{name}"].samples.values()) for name in _LEDGER}
    assert values == {"writable": [0.0], "commits_total": [7.0], "waiting": [3.0]}
    assert "kvasir_ledger_writable" not in parse(render_metrics(core, None).decode())


_LEDGER = ("writable", "commits_total", "waiting")
