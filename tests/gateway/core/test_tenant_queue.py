"""The queue: tenants take turns, a tenant's own requests keep their order, handed-back ones go first."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.gateway.core.request import Request
from kvasir.gateway.core.tenant_queue import TenantQueue
from tests.core_helpers import make_submit


def make_request(req_id: bytes, tenant: str) -> Request:
    submit, _ = make_submit(req_id, tenant=tenant)
    return Request(submit, submit.token_ids, submit.prefix_hashes, 0.0)


def drain(queue: TenantQueue) -> list[bytes]:
    taken = []
    while (request := queue.pop()) is not None:
        taken.append(request.submit.req_id)
    return taken


def test_a_flood_of_one_tenant_delays_another_by_one_request() -> None:
    queue = TenantQueue()
    for i in range(100):
        queue.push(make_request(b"a%d" % i, "alpha"))
    queue.push(make_request(b"b0", "beta"))
    assert drain(queue)[:3] == [b"a0", b"b0", b"a1"]


def test_handed_back_requests_come_first_of_their_tenant_and_before_new_tenants() -> None:
    queue = TenantQueue()
    queue.push(make_request(b"a1", "alpha"))
    queue.push(make_request(b"b1", "beta"))
    queue.push_front(make_request(b"a0", "alpha"))
    queue.push_front(make_request(b"c0", "gamma"))
    assert drain(queue) == [b"c0", b"a0", b"b1", b"a1"]


def test_iterating_and_counting_show_what_waits() -> None:
    queue = TenantQueue()
    requests = [make_request(b"a0", "alpha"), make_request(b"b0", "beta"), make_request(b"a1", "alpha")]
    for request in requests:
        queue.push(request)
    assert set(queue) == set(requests)
    assert (len(queue), requests[0] in queue) == (3, True)
    queue.remove(requests[1])
    assert drain(queue) == [b"a0", b"a1"]
    assert queue.pop() is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "front", "pop", "remove"]), st.integers(0, 3)), max_size=60))
def test_the_queue_equals_a_list_of_turns(steps: list[tuple[str, int]]) -> None:
    """The oracle: a plain list of (tenant, its requests), rotated by hand."""
    queue = TenantQueue()
    turns: list[tuple[str, deque[Request]]] = []
    for number, (what, choice) in enumerate(steps):
        tenant = f"t{choice}"
        own = next((requests for name, requests in turns if name == tenant), None)
        request = make_request(b"%d" % number, tenant)
        if what == "push":
            queue.push(request)
            if own is None:
                turns.append((tenant, deque([request])))
            else:
                own.append(request)
        elif what == "front":
            queue.push_front(request)
            if own is None:
                turns.insert(0, (tenant, deque([request])))
            else:
                own.appendleft(request)
        elif what == "pop":
            taken = queue.pop()
            if not turns:
                assert taken is None
            else:
                name, requests = turns.pop(0)
                assert taken is requests.popleft()
                if requests:
                    turns.append((name, requests))
        elif own is not None:
            queue.remove(own.pop())
            turns = [(name, requests) for name, requests in turns if requests]
        queue.check_integrity()
        assert len(queue) == sum(len(requests) for _, requests in turns)
