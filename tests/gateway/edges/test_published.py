"""Published prefixes as models see them: what counts as one, from when on, and that each is tokenised once."""

from __future__ import annotations

import threading

import pytest
import trio

from kvasir.gateway.edges.published import Published
from kvasir.gateway.tenants.directory import PublishedPrefix, RemovePrefix
from kvasir.gateway.text.model_text import ModelText
from kvasir.protocol.tokens import pack_tokens
from tests.edge_helpers import ALPHA, TEXT, make_directory, make_published

SYSTEM = "You are a careful assistant who knows the standard library of Python by heart. " * 8


def num_public(published: Published, text: str) -> int:
    return published.num_public_tokens("demo", ALPHA, pack_tokens(TEXT.encode(text)))


def test_the_longest_of_several_published_prefixes_counts() -> None:
    short, long = PublishedPrefix("short", SYSTEM[: len(SYSTEM) // 2]), PublishedPrefix("long", SYSTEM)
    both = num_public(make_published(make_directory((short, long))), SYSTEM + "x")
    assert both == num_public(make_published(make_directory((long,))), SYSTEM + "x")
    assert both > num_public(make_published(make_directory((short,))), SYSTEM + "x") > 0


def test_publishing_and_removing_take_effect_with_the_next_request() -> None:
    directory = make_directory()
    published = make_published(directory)
    assert num_public(published, SYSTEM) == 0
    directory.apply(PublishedPrefix("support", SYSTEM))
    assert num_public(published, SYSTEM) > 0
    assert published.public_tokens(directory.prefixes[0])["demo"] > 100
    directory.apply(RemovePrefix("support"))
    assert num_public(published, SYSTEM) == 0


def test_a_published_text_is_tokenised_once_whatever_is_published_later(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory([PublishedPrefix("first", SYSTEM)])
    published = make_published(directory)
    seen: list[str] = []

    def spy(text: ModelText, published: str) -> list[list[int]]:
        seen.append(published)
        return [text.encode(published)]

    monkeypatch.setattr("kvasir.gateway.edges.published.published_forms", spy)
    published.warm()
    directory.apply(PublishedPrefix("second", "x" + SYSTEM))
    assert num_public(published, SYSTEM) > 0
    directory.apply(RemovePrefix("first"))
    assert num_public(published, SYSTEM) == 0
    assert num_public(published, "x" + SYSTEM) > 0
    directory.apply(PublishedPrefix("second", "x" + SYSTEM, pinned=True))
    assert num_public(published, "x" + SYSTEM) > 0
    assert seen == [SYSTEM, "x" + SYSTEM]


def test_a_worker_pins_what_is_pinned_on_all_or_on_it() -> None:
    everywhere = PublishedPrefix("everywhere", SYSTEM, pinned=True)
    there = PublishedPrefix("there", "x" + SYSTEM, pinned=True, pinned_on=frozenset({"w1"}))
    nowhere = PublishedPrefix("nowhere", "y" + SYSTEM)
    published = make_published(make_directory([everywhere, there, nowhere]))

    def names(worker_id: str, *prefixes: PublishedPrefix) -> set[str]:
        return {pin.name.partition("/")[0] for pin in published.pins("demo", worker_id, prefixes or None)}

    assert names("w1") == {"everywhere", "there"}
    assert names("w2") == {"everywhere"}
    assert names("w1", there, nowhere) == {"there"}, "as if these were published"


def test_a_text_that_is_to_be_published_is_tokenised_in_a_thread_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory()
    published = make_published(directory)
    threads: list[bool] = []

    def spy(text: ModelText, published: str) -> list[list[int]]:
        threads.append(threading.current_thread() is threading.main_thread())
        return [text.encode(published)]

    monkeypatch.setattr("kvasir.gateway.edges.published.published_forms", spy)

    async def main() -> None:
        await published.tokenise(SYSTEM)
        directory.apply(PublishedPrefix("support", SYSTEM))
        assert num_public(published, SYSTEM) > 0

    trio.run(main)
    assert threads == [False]
