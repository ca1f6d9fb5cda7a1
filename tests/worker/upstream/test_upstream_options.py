"""The command line of a worker that fronts vLLM: what it takes, and what it refuses before anything is dialled."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvasir.protocol.errors import ConfigurationError
from kvasir.worker.upstream.hello import EventFeed, event_feed
from kvasir.worker.upstream.options import check_endpoint, parse_options
from kvasir.worker.upstream.server import Facts
from kvasir.worker.upstream.vllm import EventSource, Metrics, SchedulerLimits, ServedModel

BASE = ["--engine", "vllm", "--gateway", "ipc:///run/w.sock", "--name", "qwen"]
UPSTREAM = ["--upstream", "http://127.0.0.1:8300"]


def test_one_upstream_needs_little() -> None:
    options = parse_options([*BASE, *UPSTREAM])
    [upstream] = options.upstreams
    assert (upstream.address.host, upstream.address.port, upstream.events, upstream.replay) == (
        "127.0.0.1",
        8300,
        None,
        None,
    )
    assert (options.name, options.block_size, options.max_requests, options.api_key) == ("qwen", 16, None, None)


def test_events_are_given_per_upstream_and_may_be_off() -> None:
    more = ["--upstream", "http://10.0.0.5", "--kv-events", "off", "--kv-events", "tcp://10.0.0.5:5557"]
    options = parse_options([*BASE, *UPSTREAM, *more])
    assert [up.events for up in options.upstreams] == ["off", "tcp://10.0.0.5:5557"]


def test_the_key_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert parse_options([*BASE, *UPSTREAM, "--api-key-file", str(tmp_path / "key")]).api_key == "secret"


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ([*BASE], "required: --upstream"),
        (["--engine", "vllm", "--gateway", "ipc:///w", *UPSTREAM], "required: --name"),
        ([*BASE, "--upstream", "127.0.0.1:8300"], "no URL of a server"),
        ([*BASE, "--upstream", "http://127.0.0.1/ü"], "no URL of a server"),
        ([*BASE, *UPSTREAM, "--nonsense"], "unrecognized arguments: --nonsense"),
        ([*BASE, *UPSTREAM, "--block-size", "0"], "no whole number of at least 1"),
        ([*BASE, *UPSTREAM, "--drain", "-1"], "no number of seconds"),
        ([*BASE, *UPSTREAM, *UPSTREAM, "--kv-events", "off"], "given 1 times for 2 upstreams"),
        ([*BASE, *UPSTREAM, "--kv-events-replay", "tcp://127.0.0.1:1"], "belongs to --kv-events"),
        ([*BASE, *UPSTREAM, "--kv-events", "udp://127.0.0.1:1"], "give tcp://HOST:PORT or ipc://PATH"),
        ([*BASE, *UPSTREAM, "--kv-events", "tcp://127.0.0.1:none"], "give tcp://HOST:PORT or ipc://PATH"),
        ([*BASE, *UPSTREAM, "--kv-events", "tcp://127.0.0.1:99999"], "give tcp://HOST:PORT or ipc://PATH"),
        ([*BASE, *UPSTREAM, "--kv-events", "tcp://93.184.216.34:5557"], "is no private address"),
        ([*BASE, "--upstream", "http://93.184.216.34:8000"], "is no private address"),
        ([*BASE, "--upstream", "http://no-such-host.invalid:8000"], "is not known here"),
        ([*BASE, *UPSTREAM, "--api-key-file", "/nowhere/key"], "--api-key-file /nowhere/key"),
        (["--engine", "vllm", "--gateway", "tcp://h:1", "--name", "q", *UPSTREAM], "give ipc://PATH"),
    ],
)
def test_what_is_refused_names_the_option_and_what_to_do(args: list[str], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        parse_options(args)


def test_encryption_or_insecure_lets_an_upstream_be_anywhere() -> None:
    public = ["--upstream", "http://93.184.216.34:8000", "--kv-events", "tcp://93.184.216.34:5557"]
    assert parse_options([*BASE, "--upstream", "https://93.184.216.34"]).upstreams[0].address.is_tls
    assert parse_options([*BASE, *public, "--insecure"]).insecure


def feed_of(host: str, source: EventSource | None, *args: str) -> EventFeed | None:
    options = parse_options([*BASE, "--upstream", f"http://{host}:8300", *args])
    model, metrics = ServedModel("m", "m", 512), Metrics("1", 16, 10, 0, 0, 0.0, ())
    facts = Facts("0.32", model, metrics, SchedulerLimits(), source, has_generate=True, has_grammars=True)
    return event_feed(options, options.upstreams[0], facts)


def test_the_wildcard_of_an_event_port_is_the_servers_own_host() -> None:
    source = EventSource("tcp://*:5557", "tcp://0.0.0.0:5558", "kv")
    assert feed_of("127.0.0.1", source) == EventFeed("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", "kv")
    assert feed_of("[::1]", EventSource("tcp://*:1")) == EventFeed("tcp://[::1]:1")
    public = EventSource("tcp://93.184.216.34:5557")
    with pytest.raises(ConfigurationError, match="told by the upstream"):
        feed_of("127.0.0.1", public)
    assert feed_of("127.0.0.1", public, "--insecure") == EventFeed("tcp://93.184.216.34:5557")


def test_what_the_command_line_says_of_events_counts_more_than_what_the_server_tells() -> None:
    source = EventSource("tcp://*:5557")
    assert feed_of("127.0.0.1", source, "--kv-events", "off") is None
    assert feed_of("127.0.0.1", source, "--kv-events", "ipc:///x") == EventFeed("ipc:///x")
    assert feed_of("127.0.0.1", None) is None


def test_ipc_and_private_networks_are_no_danger() -> None:
    for endpoint in ("ipc:///run/x", "tcp://127.0.0.1:1", "tcp://10.1.2.3:1", "tcp://[::1]:1", "tcp://192.168.0.9:1"):
        check_endpoint("--kv-events", endpoint)
