"""The directory: which keys open which door, and that no altered key opens any."""

from __future__ import annotations

import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir.gateway.tenants.directory import (
    ApiKey,
    PublishedPrefix,
    RemovePrefix,
    Tenant,
    TenantDirectory,
    check_name,
    digest_key,
    issue_key,
)
from kvasir.protocol.errors import AuthenticationFailed, BadRequest, Conflict, NotFound

SECRET = bytes(range(32))
ACME = Tenant("t1", "acme", created_at=1.0)
OTHER = Tenant("t2", "other", created_at=2.0)


def make_directory() -> tuple[TenantDirectory, ApiKey, str]:
    key, text = issue_key(SECRET, ACME.id, "laptop", 1.0)
    return TenantDirectory(SECRET, [ACME, OTHER, key]), key, text


DIRECTORY, KEY, TEXT = make_directory()


def assert_refused(directory: TenantDirectory, api_key: str | None, words: str | None = None) -> str:
    with pytest.raises(AuthenticationFailed, match=words) as caught:
        directory.authenticate(api_key)
    assert len(api_key or "") < 20 or api_key not in caught.value.message
    return caught.value.message


def test_a_key_opens_its_own_tenant() -> None:
    assert DIRECTORY.authenticate(TEXT).tenant is ACME
    assert TEXT.startswith(f"kv_{KEY.id}_") and len(TEXT.rpartition("_")[2]) == 64


@given(st.data())
def test_an_altered_key_opens_nothing(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TEXT)))
    end = data.draw(st.integers(at, min(len(TEXT), at + 3)))
    altered = TEXT[:at] + data.draw(st.text(max_size=3)) + TEXT[end:]
    if altered == TEXT:
        assert DIRECTORY.authenticate(altered).tenant is ACME
    else:
        assert_refused(DIRECTORY, altered)


@given(st.text(max_size=300) | st.builds("kv_{}_{}".format, st.text(max_size=20), st.text(max_size=300)))
def test_a_made_up_key_opens_nothing(text: str) -> None:
    assert_refused(DIRECTORY, text)


def test_unknown_revoked_and_wrong_keys_are_answered_alike() -> None:
    directory, key, text = make_directory()
    wrong = assert_refused(directory, text[:-1] + ("0" if text[-1] != "0" else "1"))
    unknown = assert_refused(directory, "kv_000000000000_" + "0" * 64)
    directory.apply(ApiKey(key.id, key.tenant_id, key.digest, revoked_at=5.0))
    assert assert_refused(directory, text) == wrong == unknown


def test_a_missing_and_a_malformed_key_are_told_apart() -> None:
    for nothing in (None, ""):
        assert_refused(DIRECTORY, nothing, "no API key")
    for malformed in ("hello", "kv_", "kv_x", "kv__x", "sk_x_y", TEXT.upper(), TEXT + "0" * 300):
        assert_refused(DIRECTORY, malformed, "no Kvasir API key|unknown")


def test_a_disabled_tenant_is_told_so_only_with_a_valid_key() -> None:
    directory, _, text = make_directory()
    directory.apply(Tenant("t1", "acme", "disabled"))
    assert_refused(directory, text, "acme is disabled")
    assert "disabled" not in assert_refused(directory, text + "0")
    directory.apply(ACME)
    assert directory.authenticate(text).tenant is ACME


def test_a_key_of_another_deployment_opens_nothing() -> None:
    directory = TenantDirectory(bytes(32), [ACME, KEY])
    assert_refused(directory, TEXT)


def test_the_digest_covers_the_id_and_depends_on_the_deployment() -> None:
    digests = {digest_key(SECRET, "a", "bc"), digest_key(SECRET, "ab", "c"), digest_key(bytes(32), "a", "bc")}
    assert len(digests) == 3


def test_authentication_costs_microseconds() -> None:
    each_us = min(timeit.repeat(lambda: DIRECTORY.authenticate(TEXT), number=1000, repeat=5)) * 1000
    assert each_us < 100  # measured at about 3 µs; the bound only catches a slow hash


def test_scopes_are_the_tenants_own_unless_it_is_in_a_group() -> None:
    assert ACME.scope == ("tenant", "t1")
    assert Tenant("t3", "x", sharing="group:acme").scope == ("group", "acme")
    assert ACME.may_use("any") and not Tenant("t3", "x", allowed_models=frozenset()).may_use("any")


def test_two_tenants_never_share_a_name() -> None:
    directory, _, _ = make_directory()
    with pytest.raises(Conflict):
        directory.apply(Tenant("t9", "acme"))
    directory.apply(Tenant("t1", "renamed"))
    assert directory.tenant("renamed").id == "t1"
    with pytest.raises(NotFound, match="acme"):
        directory.tenant("acme")


def test_prefixes_come_and_go_oldest_first_and_every_change_is_another_tuple() -> None:
    directory, _, _ = make_directory()
    before = directory.prefixes
    directory.apply(PublishedPrefix("all", "text"))
    directory.apply(PublishedPrefix("some", "text", frozenset({"t1"})))
    assert directory.prefixes is not before
    assert [prefix.name for prefix in directory.prefixes] == ["all", "some"]
    directory.apply(RemovePrefix("all"))
    assert [prefix.name for prefix in directory.prefixes] == ["some"]


def test_a_key_is_found_by_its_id_or_by_the_whole_key() -> None:
    assert DIRECTORY.key(KEY.id) is DIRECTORY.key(TEXT) is KEY
    with pytest.raises(NotFound, match="nope") as caught:
        DIRECTORY.key("kv_nope_verysecret")
    assert "verysecret" not in caught.value.message


@pytest.mark.parametrize("name", ["a", "a1", "team-a", "0", "x" * 63])
def test_good_names_are_taken(name: str) -> None:
    assert check_name(name, "tenant") == name


@pytest.mark.parametrize("name", ["", "A", "ä", "a_b", "a b", "-a", "a-", "x" * 64, "a\n", "../x"])
def test_other_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(BadRequest, match="lower-case letters"):
        check_name(name, "tenant")
