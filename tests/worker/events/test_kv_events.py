"""Block events: their bytes, and that followers end up exact whatever gets lost on the way."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from kvasir.cache.events import Stored
from kvasir.protocol.errors import ConfigurationError
from kvasir.protocol.messages import Resync, Snapshot
from kvasir.protocol.prefix import split_hashes
from kvasir.protocol.tokens import pack_tokens
from kvasir.worker.events import access as kv_access
from kvasir.worker.events import kv_events
from kvasir.worker.events import publisher as kv_publisher
from kvasir.worker.events.kv_events import KvEvents
from kvasir.worker.events.publisher import KvPublisher, PublisherOptions
from kvasir.worker.events.wire import WireForm, encode_batch
from kvasir.worker.options import parse_options
from tests.engine_helpers import Rig, make_generate, make_prompt
from tests.kv_follower import Follower, Replica, clears, read_event
from tests.worker.test_worker_process import Gateway, open_gateway

pytestmark = pytest.mark.timeout(60)


# ---- the wire


H1, H2, H3 = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))


def make_pieces() -> list[Stored]:
    """A root block, its child, and a block whose parent is elsewhere: two runs."""
    root = Stored(None, H1, pack_tokens([1, 300]))
    child = Stored(H1, H2, pack_tokens([2, 70000]))
    other = Stored(H1, H3, pack_tokens([7, 8]))
    return [root, child, other]


def stored(form: WireForm) -> bytes:
    return encode_batch(1.5, list(form.stored(make_pieces(), 2)))


STORED_1 = (
    "ac626c6f636b5f686173686573 92 c410000102030405060708090a0b0c0d0e0f c410101112131415161718191a1b1c1d1e1f"
    "b1706172656e745f626c6f636b5f68617368 c0"
)
STORED_2 = (
    "ac626c6f636b5f686173686573 91 c410202122232425262728292a2b2c2d2e2f"
    "b1706172656e745f626c6f636b5f68617368 c410000102030405060708090a0b0c0d0e0f"
)
# block_size 2, lora_id nil, medium "GPU", lora_name nil
STORED_REST = "aa626c6f636b5f73697a65 02 a76c6f72615f6964 c0 a66d656469756d a3475055 a96c6f72615f6e616d65 c0"
TYPE_STORED = "88 a474797065 ab426c6f636b53746f726564"
NO_TOKENS = "a9746f6b656e5f696473 90"
HEAD = "93 cb3ff8000000000000"  # an array of three that begins with 1.5


def as_map(hashes: list[Any], parent: Any, token_ids: list[int]) -> dict[str, Any]:
    rest = {"block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None}
    return {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": token_ids} | rest


GOLDEN = {
    "map of bytes": (
        lambda: stored(WireForm()),
        f"{HEAD} 92 {TYPE_STORED} {STORED_1} {NO_TOKENS} {STORED_REST}"
        f"{TYPE_STORED} {STORED_2} {NO_TOKENS} {STORED_REST} 00",
        [1.5, [as_map([H1, H2], None, []), as_map([H3], H1, [])], 0],
    ),
    "map of numbers with token ids": (
        lambda: stored(WireForm("map", "int", True)),
        f"{HEAD} 92 {TYPE_STORED} ac626c6f636b5f686173686573 92 cf08090a0b0c0d0e0f cf18191a1b1c1d1e1f"
        f"b1706172656e745f626c6f636b5f68617368 c0 a9746f6b656e5f696473 94 01 cd012c 02 ce00011170 {STORED_REST}"
        f"{TYPE_STORED} ac626c6f636b5f686173686573 91 cf28292a2b2c2d2e2f"
        f"b1706172656e745f626c6f636b5f68617368 cf08090a0b0c0d0e0f a9746f6b656e5f696473 92 07 08 {STORED_REST} 00",
        [
            1.5,
            [
                as_map([0x08090A0B0C0D0E0F, 0x18191A1B1C1D1E1F], None, [1, 300, 2, 70000]),
                as_map([0x28292A2B2C2D2E2F], 0x08090A0B0C0D0E0F, [7, 8]),
            ],
            0,
        ],
    ),
    "array of bytes": (
        lambda: stored(WireForm("array")),
        f"{HEAD} 92 98 ab426c6f636b53746f726564"
        "92 c410000102030405060708090a0b0c0d0e0f c410101112131415161718191a1b1c1d1e1f c0 90 02 c0 a3475055 c0"
        "98 ab426c6f636b53746f726564 91 c410202122232425262728292a2b2c2d2e2f c410000102030405060708090a0b0c0d0e0f"
        "90 02 c0 a3475055 c0 00",
        [
            1.5,
            [
                ["BlockStored", [H1, H2], None, [], 2, None, "GPU", None],
                ["BlockStored", [H3], H1, [], 2, None, "GPU", None],
            ],
            0,
        ],
    ),
    "array of numbers with token ids": (
        lambda: stored(WireForm("array", "int", True)),
        f"{HEAD} 92 98 ab426c6f636b53746f726564 92 cf08090a0b0c0d0e0f cf18191a1b1c1d1e1f c0"
        "94 01 cd012c 02 ce00011170 02 c0 a3475055 c0"
        "98 ab426c6f636b53746f726564 91 cf28292a2b2c2d2e2f cf08090a0b0c0d0e0f 92 07 08 02 c0 a3475055 c0 00",
        [
            1.5,
            [
                [
                    "BlockStored",
                    [0x08090A0B0C0D0E0F, 0x18191A1B1C1D1E1F],
                    None,
                    [1, 300, 2, 70000],
                    2,
                    None,
                    "GPU",
                    None,
                ],
                ["BlockStored", [0x28292A2B2C2D2E2F], 0x08090A0B0C0D0E0F, [7, 8], 2, None, "GPU", None],
            ],
            0,
        ],
    ),
    "removed, map": (
        lambda: encode_batch(1.5, [WireForm().removed([H2, H1])]),
        f"{HEAD} 91 83 a474797065 ac426c6f636b52656d6f766564 ac626c6f636b5f686173686573"
        "92 c410101112131415161718191a1b1c1d1e1f c410000102030405060708090a0b0c0d0e0f a66d656469756d a3475055 00",
        [1.5, [{"type": "BlockRemoved", "block_hashes": [H2, H1], "medium": "GPU"}], 0],
    ),
    "removed, array of numbers": (
        lambda: encode_batch(1.5, [WireForm("array", "int").removed([H2])]),
        f"{HEAD} 91 93 ac426c6f636b52656d6f766564 91 cf18191a1b1c1d1e1f a3475055 00",
        [1.5, [["BlockRemoved", [0x18191A1B1C1D1E1F], "GPU"]], 0],
    ),
    "cleared, map": (
        lambda: encode_batch(1.5, [WireForm().cleared()]),
        f"{HEAD} 91 81 a474797065 b0416c6c426c6f636b73436c6561726564 00",
        [1.5, [{"type": "AllBlocksCleared"}], 0],
    ),
    "cleared, array": (
        lambda: encode_batch(1.5, [WireForm("array").cleared()]),
        f"{HEAD} 91 91 b0416c6c426c6f636b73436c6561726564 00",
        [1.5, [["AllBlocksCleared"]], 0],
    ),
    "nothing, an idle worker's sign of life": (lambda: encode_batch(1.5, []), f"{HEAD} 90 00", [1.5, [], 0]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_every_event_form_has_the_documented_bytes(name: str) -> None:
    make, golden, plain = GOLDEN[name]
    assert make().hex(" ") == bytes.fromhex(golden).hex(" ")
    assert msgspec.msgpack.decode(bytes.fromhex(golden)) == plain


# ---- the engine's side, with an outlet that refuses


class Outlet:
    """Takes a batch when `has_room` says so; a replica reads along."""

    def __init__(self, has_room: Callable[[], bool] = lambda: True) -> None:
        self.has_room = has_room
        self.replica = Replica()
        self.payloads: list[bytes] = []
        self.wanted = False
        self.num_refused = 0
        self.socket: zmq.Socket[bytes]

    def offer(self, payload: bytes, is_clear: bool) -> bool:
        if not self.has_room():
            self.num_refused += 1
            return False
        assert is_clear == clears(payload)
        self.payloads.append(payload)
        self.replica.apply(payload)
        return True

    def wants_announcement(self) -> bool:
        wanted, self.wanted = self.wanted, False
        return wanted

    def close(self) -> None:
        pass


def make_stream(rig: Rig, outlet: Outlet, form: WireForm | None = None) -> KvEvents:
    events = KvEvents(rig.cache, form or WireForm(), outlet)
    rig.engine.on_blocks = events.on_step
    return events


def drive(rig: Rig, rng: random.Random, number: int) -> None:
    """Submit something whose prefix may be resident, and step now and then."""
    prompt = make_prompt(rng.randrange(4, 60), salt=rng.randrange(6))
    rig.submit(make_generate(prompt, rng.randrange(1, 6), req_id=b"%d" % number))
    for _ in range(rng.randrange(4)):
        rig.step()


def resident(rig: Rig) -> set[bytes]:
    return set(split_hashes(rig.cache.resident_hashes()))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_outlet_refuses_the_stream_becomes_exact_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "CHUNK_BLOCKS", 3)  # so that much happens between two pieces of an announcement
    rng = random.Random(seed)
    rig = Rig(24)
    outlet = Outlet(lambda: rng.random() < 0.7)
    events = make_stream(rig, outlet)
    for number in range(150):
        drive(rig, rng, number)
        events.pump()
        if rng.random() < 0.05:
            outlet.wanted = True
    outlet.has_room = lambda: True
    rig.run()
    while events.has_work:
        events.pump()
    assert outlet.replica.blocks == resident(rig)
    assert outlet.num_refused > 5
    assert outlet.replica.orphans == 0, "a child was announced before its parent"
    assert rig.cache.statistics().num_evicted > 50


def test_a_stream_that_forgets_its_losses_would_be_found_out() -> None:
    rng = random.Random(1)
    rig = Rig(24)
    outlet = Outlet(lambda: rng.random() < 0.7)
    events = make_stream(rig, outlet)
    events.announce_all = lambda: None  # type: ignore[method-assign]
    for number in range(150):
        drive(rig, rng, number)
        events.pump()
    rig.run()
    assert outlet.replica.blocks != resident(rig)


def test_token_ids_are_left_out_unless_asked_for() -> None:
    for wants in (False, True):
        rig = Rig(64)
        outlet = Outlet()
        events = make_stream(rig, outlet, WireForm(token_ids=wants))
        events.pump()
        prompt = make_prompt(32)
        rig.submit(make_generate(prompt, 1))
        rig.run()
        found = [event for p in outlet.payloads for event in msgspec.msgpack.decode(p)[1] if event.get("block_hashes")]
        assert [event["token_ids"] for event in found] == [prompt[:32] if wants else []]
        assert [len(event["block_hashes"]) for event in found] == [8]


# ---- over sockets


class Site:
    """A worker's engine, its publisher on real sockets, and a place for followers."""

    def __init__(self, folder: Path, form: WireForm, **options: object) -> None:
        self.form = form
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.options = PublisherOptions(
            f"ipc://{folder}/events.sock",
            f"ipc://{folder}/replay.sock",
            replay_with_topic=form.form == "map",
            **options,  # type: ignore[arg-type]
        )
        self.number = 0
        self.followers: list[Follower] = []
        self.rig = Rig(32)
        self.publisher = KvPublisher(self.options, form)
        self.events = self._attach()

    def restart(self, keep_cache: bool = False) -> None:
        """Be gone without a farewell that anybody is sure to get, and come back."""
        self.publisher.close()
        if not keep_cache:
            self.rig = Rig(32)
        self.publisher = KvPublisher(self.options, self.form)
        self.events = self._attach()

    def follow(self, chaos: random.Random | None = None, **how: object) -> Follower:
        arguments = {"endpoint": self.options.endpoint, "replay": self.options.replay_endpoint, "chaos": chaos} | how
        follower = Follower(self.context, **arguments)  # type: ignore[arg-type]
        self.followers.append(follower)
        return follower

    def work(self, rng: random.Random) -> None:
        self.number += 1
        drive(self.rig, rng, self.number)
        self.events.pump()

    def finish(self) -> None:
        self.rig.run()
        self.events.pump()

    def expected(self) -> set[bytes | int]:
        return {self.form.hash(digest) for digest in resident(self.rig)}

    def settle(self, follower: Follower, within_s: float = 10.0) -> float:
        """Return the seconds until `follower` is exact; fail if that takes longer than `within_s`."""
        start = time.monotonic()
        while follower.replica.blocks != self.expected() or not follower.replica.blocks:
            assert time.monotonic() < start + within_s, (
                f"after {within_s} s {len(follower.replica.blocks)} blocks, not {len(self.expected())}"
            )
            self.events.pump()
            follower.pump(0.01)
        return time.monotonic() - start

    def _attach(self) -> KvEvents:
        events = KvEvents(self.rig.cache, self.form, self.publisher)
        self.rig.engine.on_blocks = events.on_step
        return events


@contextlib.contextmanager
def open_site(form: WireForm | None = None, **options: object) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    site = Site(folder, form or WireForm(), **options)
    try:
        yield site
    finally:
        site.publisher.close()
        for follower in site.followers:
            follower.close()
        site.context.term()
        shutil.rmtree(folder)


@pytest.mark.parametrize("form", [WireForm(), WireForm("array", "int", True)], ids=["map", "array"])
def test_a_follower_through_loss_disorder_and_restarts_is_exact_again(form: WireForm) -> None:
    rng = random.Random(7)
    with open_site(form) as site:
        follower = site.follow(rng)
        for turn in range(400):
            site.work(rng)
            follower.pump()
            time.sleep(0.001)  # real time: sockets carry the rest
            if rng.random() < 0.02:
                follower.close()
                follower = site.follow(rng)
            if turn % 150 == 149:
                site.restart(keep_cache=turn == 149)
        follower.chaos = None
        site.work(rng)
        site.finish()
        took_s = site.settle(follower)
        assert sum(each.num_replays for each in site.followers) > 1  # the last one may have come just now
        assert site.rig.cache.statistics().num_evicted > 100
        print(f"exact after {1000 * took_s:.0f} ms")


def test_without_replay_a_follower_that_loses_something_stays_wrong() -> None:
    rng = random.Random(7)
    with open_site() as site:
        follower = site.follow(rng, replay=None)
        for _ in range(100):
            site.work(rng)
            follower.pump(0.001)
        follower.chaos = None
        site.work(rng)
        site.finish()
        with pytest.raises(AssertionError, match="blocks, not"):
            site.settle(follower, within_s=0.7)


def test_the_last_batch_lost_is_noticed_although_nothing_follows() -> None:
    with open_site() as site:
        follower = site.follow()
        site.work(random.Random(1))
        site.finish()
        site.settle(follower)
        follower.chaos = AlwaysLose()
        site.work(random.Random(2))
        site.finish()
        deadline = time.monotonic() + 5
        heard = follower.num_live
        while follower.num_live == heard and time.monotonic() < deadline:
            follower.pump(0.01)
        assert follower.replica.blocks != site.expected()
        follower.chaos = None
        site.settle(follower)


class AlwaysLose(random.Random):
    def random(self) -> float:
        return 0.0


def test_a_follower_who_asks_for_more_than_is_kept_gets_everything_announced_anew() -> None:
    rng = random.Random(3)
    with open_site(max_buffered=20) as site:
        early = site.follow()
        for _ in range(60):
            site.work(rng)
            early.pump()
        site.finish()
        site.settle(early)
        late = site.follow()
        site.settle(late)
        # Whoever comes after that finds the announcement in the buffer: nothing is announced again.
        heard = early.num_live
        site.settle(site.follow())
        early.pump(0.1)
        assert early.num_live - heard < 5
        site.settle(early)


def test_a_stalled_publisher_never_holds_up_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    serve = kv_publisher._Stream._serve

    def stalled(stream: kv_publisher._Stream) -> bool:
        released.wait(30)
        return serve(stream)

    monkeypatch.setattr(kv_publisher._Stream, "_serve", stalled)
    rng = random.Random(5)
    with open_site() as site:
        follower = site.follow()
        site.events.pump()
        num_taken = 0
        start = time.monotonic()
        while site.publisher.offer(b"\x93\xcb\x3f\xf8" + bytes(6) + b"\x90\x00", False):
            num_taken += 1
        for _ in range(20):
            site.work(rng)
        assert time.monotonic() - start < 5.0
        assert kv_publisher.MAX_QUEUED - 10 <= num_taken <= kv_publisher.MAX_QUEUED
        assert site.events.has_work
        released.set()
        site.finish()
        site.settle(follower)


def test_a_client_that_does_not_take_its_replay_holds_up_nobody() -> None:
    large = encode_batch(1.0, [WireForm().removed([H1] * 1000)])
    with open_site() as site:
        site.work(random.Random(1))
        site.finish()
        for _ in range(1000):
            assert site.publisher.offer(large, False)
            time.sleep(0.0001)
        stuck = site.context.socket(zmq.DEALER)
        stuck.setsockopt(zmq.LINGER, 0)
        stuck.setsockopt(zmq.RCVHWM, 1)
        stuck.connect(site.options.replay_endpoint)
        stuck.send_multipart([b"", bytes(8)])
        assert stuck.poll(5000)
        site.settle(site.follow())
        site.work(random.Random(2))
        site.finish()
        site.settle(site.followers[0])
        num_answers = 0
        while stuck.recv_multipart()[-2] != b"\xff" * 8:
            num_answers += 1
            assert stuck.poll(5000)
        assert num_answers >= 1000
        stuck.close()


def test_garbage_on_the_replay_socket_changes_nothing() -> None:
    with open_site() as site:
        dealer = site.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(site.options.replay_endpoint)
        for frames in ([b""], [b"", b"short"], [b"", bytes(9)], [b"", bytes(8), b""], [bytes(8)]):
            dealer.send_multipart(frames)
        dealer.send_multipart([b"", b"\xff" * 8])
        assert dealer.poll(5000)
        assert dealer.recv_multipart() == [b"", b"", b"\xff" * 8, b""]
        dealer.close()
        site.work(random.Random(1))
        site.finish()
        site.settle(site.follow())


@pytest.mark.parametrize("form", [WireForm("map"), WireForm("array")], ids=["map", "array"])
def test_a_replay_has_the_frames_of_its_form(form: WireForm) -> None:
    with open_site(form, topic="kv@box@model") as site:
        site.work(random.Random(1))
        site.finish()
        follower = site.follow(topic=b"kv@")
        site.settle(follower)
        dealer = site.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(site.options.replay_endpoint)
        dealer.send_multipart([b"", bytes(8)])
        answers = []
        while not answers or answers[-1][-2] != b"\xff" * 8:
            assert dealer.poll(5000)
            answers.append(dealer.recv_multipart())
        dealer.close()
        topic = [b"kv@box@model"] if form.form == "map" else []
        assert [answer[:-2] for answer in answers[:-1]] == [[b"", *topic]] * (len(answers) - 1)
        assert answers[-1] == [b"", *topic[:0], *([b""] if topic else []), b"\xff" * 8, b""]
        seqs = [int.from_bytes(answer[-2], "big") for answer in answers[:-1]]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        assert read_event(msgspec.msgpack.decode(answers[0][-1])[1][0])[0] == "AllBlocksCleared"


# ---- who may read


def test_with_curve_only_known_keys_get_in() -> None:
    server_public, server_secret = zmq.curve_keypair()
    known, stranger = zmq.curve_keypair(), zmq.curve_keypair()
    with open_site(secret_key=server_secret, client_keys=frozenset([known[0]])) as site:
        site.work(random.Random(1))
        site.finish()
        refused = [site.follow(keys=(server_public, *stranger)), site.follow()]
        friend = site.follow(keys=(server_public, *known))
        site.settle(friend)
        for follower in refused:
            follower.pump(0.3)
            assert (follower.num_live, follower.last) == (0, -1)


@pytest.mark.parametrize(
    "change",
    [
        lambda frames: frames[:8],
        lambda frames: [*frames, b"x"],
        lambda frames: [*frames[:2], b"2.0", *frames[3:]],
        lambda frames: [*frames[:4], b"global", *frames[5:]],
        lambda frames: [*frames[:7], b"NULL", frames[8]],
        lambda frames: [*frames[:8], bytes(32)],
    ],
)
def test_the_gatekeeper_refuses_whatever_it_does_not_know(change: Callable[[list[bytes]], list[bytes]]) -> None:
    public, secret = zmq.curve_keypair()
    request = [b"", b"1.0", b"7", kv_access.ZAP_DOMAIN, b"127.0.0.1", b"", b"CURVE", zmq.utils.z85.decode(public)]
    with open_site(secret_key=secret, client_keys=frozenset([public])) as site:
        asker = site.publisher._context.socket(zmq.DEALER)
        asker.setsockopt(zmq.LINGER, 0)
        asker.connect("inproc://zeromq.zap.01")
        asker.send_multipart(request)
        assert asker.poll(5000)
        assert asker.recv_multipart()[3] == b"200"
        asker.send_multipart(change([b"me", *request])[1:])
        assert asker.poll(5000)
        assert asker.recv_multipart()[3] == b"400"
        asker.close()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--kv-events", "tcp://*:5557"], "--insecure-events"),
        (["--kv-events", "tcp://10.0.0.7:5557"], "--insecure-events"),
        (["--kv-events", "tcp://127.0.0.1.example.com:5557"], "--insecure-events"),
        (["--kv-events", "tcp://[::]:5557"], "--insecure-events"),
        (["--kv-events", "connect:tcp://router:5557"], "--insecure-events"),
        (
            ["--kv-events", "ipc:///tmp/x", "--kv-events-replay", "tcp://0.0.0.0:1"],
            "--kv-events-replay 'tcp://0.0.0.0:1'",
        ),
        (["--kv-events", "http://x"], "is no endpoint"),
        (["--kv-events", "ipc://"], "is no endpoint"),
        (["--kv-events-replay", "ipc:///tmp/x"], "give --kv-events ENDPOINT too"),
        (["--publish-token-ids"], "give --kv-events ENDPOINT too"),
        (["--kv-events", "tcp://*:1", "--kv-events-key", "/nowhere"], "belong together"),
        (
            ["--kv-events", "tcp://*:1", "--kv-events-key", "{bad}", "--kv-events-clients", "{good}"],
            "no CURVE secret key",
        ),
        (
            ["--kv-events", "tcp://*:1", "--kv-events-key", "{key}", "--kv-events-clients", "{bad}"],
            "line 1 begins with no",
        ),
        (["--kv-events", "tcp://*:1", "--kv-events-key", "{key}", "--kv-events-clients", "{empty}"], "names no key"),
        (["--kv-events", "tcp://*:1", "--kv-events-key", "{key}", "--kv-events-clients", "/nowhere"], "No such file"),
        (
            ["--kv-events", "connect:tcp://x:1", "--kv-events-key", "{key}", "--kv-events-clients", "{good}"],
            "a key protects a bound socket",
        ),
    ],
)
def test_what_would_let_others_read_or_makes_no_sense_is_refused(args: list[str], text: str, tmp_path: Path) -> None:
    files = write_keys(tmp_path)
    with pytest.raises(ConfigurationError, match=text.replace("(", r"\(")):
        parse_options(["--model", "oracle:", "--gateway", "ipc:///tmp/x", *(arg.format(**files) for arg in args)])


@pytest.mark.parametrize(
    "args",
    [
        ["--kv-events", "tcp://127.0.0.1:5557"],
        ["--kv-events", "tcp://[::1]:5557"],
        ["--kv-events", "tcp://localhost:5557", "--kv-events-replay", "tcp://127.3.2.1:5558"],
        ["--kv-events", "tcp://*:5557", "--insecure-events"],
        ["--kv-events", "connect:tcp://router:5557", "--insecure-events"],
        ["--kv-events", "tcp://*:5557", "--kv-events-key", "{key}", "--kv-events-clients", "{good}"],
        ["--kv-events", "tcp://*:5557", "--kv-events-key", "{zmq_key}", "--kv-events-clients", "{good}"],
    ],
)
def test_what_is_safe_or_asked_for_by_name_is_allowed(args: list[str], tmp_path: Path) -> None:
    files = write_keys(tmp_path)
    options = parse_options(["--model", "oracle:", "--gateway", "ipc:///x", *(arg.format(**files) for arg in args)])
    assert (options.kv_events.secret_key is not None) == ("--kv-events-key" in args)


def test_workers_of_one_command_line_publish_in_places_of_their_own() -> None:
    args = ["--kv-events", "ipc:///run/{worker}.sock", "--kv-events-topic", "kv@{worker}@demo", "--worker-id", "demo-1"]
    options = parse_options(["--model", "oracle:", "--gateway", "ipc:///x", *args]).kv_events
    assert (options.endpoint, options.replay_endpoint, options.topic) == (
        "ipc:///run/demo-1.sock",
        None,
        "kv@demo-1@demo",
    )


def write_keys(folder: Path) -> dict[str, str]:
    public, secret = zmq.curve_keypair()
    texts = {
        "key": secret.decode() + "\n",
        "zmq_key": f'metadata\ncurve\n    public-key = "{public.decode()}"\n    secret-key = "{secret.decode()}"\n',
        "good": f"# routers\n\n{public.decode()} router-1\n",
        "bad": "not a key\n",
        "empty": "# nobody\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: str(folder / name) for name in texts}


def test_an_endpoint_that_is_taken_is_named() -> None:
    with open_site() as site:
        taken = site.context.socket(zmq.PUB)
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ConfigurationError, match=f"--kv-events tcp://127.0.0.1:{port}: .*in use"):
            KvPublisher(PublisherOptions(f"tcp://127.0.0.1:{port}"), WireForm())
        taken.close()
        with pytest.raises(ConfigurationError, match=r"events\.sock: .*in use"):
            KvPublisher(site.options, site.form)
        site.work(random.Random(1))
        site.finish()
        site.settle(site.follow())  # undisturbed


# ---- whole processes


@pytest.mark.parametrize(
    "extra", [[], ["--kv-events-form", "array", "--kv-events-hashes", "int"]], ids=["map", "array"]
)
def test_a_follower_of_a_worker_process_knows_what_it_holds_even_after_a_kill(extra: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    ends = [f"ipc://{folder}/events.sock", f"ipc://{folder}/replay.sock"]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    follower = Follower(context, ends[0], ends[1])
    form = WireForm("map", "int" if extra else "bytes")
    try:
        args = ["--kv-memory", "1K", "--kv-events", ends[0], "--kv-events-replay", ends[1], *extra]
        with open_gateway(*args) as gateway:
            run_some(gateway, salt=0)
            assert_follows(gateway, follower, form)
            first = set(follower.replica.blocks)
            gateway.process.kill()
            gateway.exit_code()
        with open_gateway(*args) as gateway:
            run_some(gateway, salt=10)
            assert_follows(gateway, follower, form)
            assert follower.replica.blocks.isdisjoint(first)
            gateway.process.terminate()
            assert gateway.exit_code() == 0
            wait_until(follower, lambda: not follower.replica.blocks)  # the farewell
    finally:
        follower.close()
        context.term()
        shutil.rmtree(folder)


def run_some(gateway: Gateway, salt: int) -> None:
    gateway.welcome()
    for i in range(8):
        gateway.send(make_generate(make_prompt(30, salt=salt + i), 9, req_id=b"%d" % i))
        gateway.finish(b"%d" % i)


def assert_follows(gateway: Gateway, follower: Follower, form: WireForm) -> None:
    gateway.send(Resync())
    expected = {form.hash(digest) for digest in split_hashes(gateway.expect(Snapshot).hashes)}
    assert len(expected) > 20
    wait_until(follower, lambda: follower.replica.blocks == expected)


def wait_until(follower: Follower, holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"{len(follower.replica.blocks)} blocks after {within_s} s"
        follower.pump(0.02)
