"""What an outbox keeps for clients that do not read, and what it says of those that are lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from kvasir.gateway.edges.outbox import Outbox, OutboxLimits
from kvasir.protocol.link import LinkBusy, PeerGone


class Wire:
    """Takes the link's place: takes what it is given while `trouble` is None."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.sent: list[Sequence[bytes]] = []

    def send_nowait(self, frames: Sequence[bytes]) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.sent.append(list(frames))


def make(**limits: float) -> tuple[Wire, Outbox[str]]:
    wire = Wire()
    return wire, Outbox(wire, OutboxLimits(**limits))  # type: ignore[arg-type]


def test_a_peer_that_is_gone_is_returned_with_its_calls_and_forgotten() -> None:
    wire, outbox = make()
    peer = outbox.peer(b"p")
    peer.calls[7] = "a call"
    outbox.post(peer, 7, b"x")
    wire.trouble = PeerGone("gone")
    assert outbox.flush() == [peer] and outbox.flush() == []
    assert (peer.calls, peer.cut, outbox.num_peers(), outbox.num_gone) == ({7: "a call"}, False, 0, 1)


@pytest.mark.parametrize(("limits", "frame"), [({"max_messages": 2}, b""), ({"max_bytes": 29}, b"0123456789")])
def test_a_peer_of_which_too_much_is_kept_is_cut_once_and_says_which_calls_lost_what(limits, frame) -> None:
    async def main() -> None:
        wire, outbox = make(**limits)
        peer = outbox.peer(b"p")
        wire.trouble = LinkBusy("busy")
        for call_id in (1, 2):
            outbox.post(peer, call_id, frame)
            assert outbox.flush() == []
        assert outbox.num_waiting() == 2
        outbox.post(peer, 3, frame)
        assert outbox.flush() == [peer]
        assert (peer.cut, peer.lost, outbox.num_waiting(), outbox.num_cut) == (True, [1, 2, 3], 0, 1)
        for _ in range(4):
            outbox.post(peer, 1, frame)
            assert outbox.flush() == []  # what is posted to one that is cut is kept
        wire.trouble = None
        assert await outbox.retry() == []
        assert [frames[1:] for frames in wire.sent] == [[frame]] * 4
        assert not peer.cut and outbox.num_waiting() == outbox.num_peers() == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_peer_that_stays_stuck_is_cut_and_reported_again_when_it_is_gone() -> None:
    async def main() -> None:
        wire, outbox = make(stuck_s=1.0, retry_s=0.3)
        peer = outbox.peer(b"p")
        wire.trouble = LinkBusy("busy")
        outbox.post(peer, 5, b"x")
        outbox.flush()
        found = [await outbox.retry() for _ in range(4)]
        assert found == [[], [], [], [peer]]
        wire.trouble = PeerGone("gone")
        outbox.post(peer, 5, b"y")
        assert outbox.flush() == [peer] and not peer.cut

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
