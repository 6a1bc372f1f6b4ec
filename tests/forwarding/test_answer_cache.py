"""What is remembered, for how long, and in how much memory."""

from __future__ import annotations

from gateway.forwarding.sharing import Answer, AnswerCache, Shares, ShareSettings, maybe_key
from gateway.forwarding.sharing.answer_cache import OVERHEAD
from gateway.types import Served, Variant
from gateway.upstream.known import KnownModel
from gateway.v2.peek import peek_request

SERVED = Served("m", "v", "1", "a:1", 1)


def answer(size: int) -> Answer:
    return Answer(bytes(size), (), (), SERVED)


def test_the_answer_that_was_asked_for_the_longest_ago_goes_first() -> None:
    cache, known = AnswerCache(2 * (OVERHEAD + 100), 10.0), KnownModel("net", "")
    for key in ("a", "b"):
        cache.keep(key, answer(100), known, 0.0)
    assert cache.maybe_find("a", 1.0) is not None
    cache.keep("c", answer(100), known, 1.0)
    assert [key for key in "abc" if cache.maybe_find(key, 2.0) is not None] == ["a", "c"]
    assert (len(cache), cache.bytes, cache.evictions) == (2, cache.most, 1)


def test_an_answer_larger_than_all_of_it_drives_nothing_out() -> None:
    cache, known = AnswerCache(2000, 10.0), KnownModel("net", "")
    cache.keep("a", answer(100), known, 0.0)
    cache.keep("b", answer(2000), known, 0.0)
    assert cache.maybe_find("a", 1.0) is not None
    assert cache.maybe_find("b", 1.0) is None


def test_a_newer_answer_takes_the_place_of_an_older_one() -> None:
    cache, known = AnswerCache(4000, 10.0), KnownModel("net", "")
    cache.keep("a", answer(100), known, 0.0)
    cache.keep("a", answer(200), known, 9.0)
    assert (len(cache), cache.bytes) == (1, 200 + OVERHEAD)
    assert cache.maybe_find("a", 11.0) is not None
    assert cache.maybe_find("a", 19.0) is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_nothing_is_remembered_of_a_model_that_changed_while_it_was_asked() -> None:
    cache, known = AnswerCache(4000, 10.0), KnownModel("net", "")
    cache.keep("a", answer(100), known, 0.0)
    known.forget()
    assert cache.maybe_find("a", 1.0) is None
    cache.keep("a", answer(100), known, 1.0)
    assert len(cache) == 0


def test_metadata_and_message_can_not_be_moved_into_one_another() -> None:
    body = b"\x0a\x01m\x12\x011"
    head = peek_request(body)
    keys = {
        maybe_key(body, head, fields)
        for fields in ([], [(b"a", b"bc")], [(b"ab", b"c")], [(b"a", b""), (b"b", b"c")], [(b"b", b"c"), (b"a", b"")])
    }
    assert None not in keys
    assert len(keys) == 5


def test_a_message_whose_scalars_are_where_no_serializer_writes_them_is_nobody_elses() -> None:
    body = b"\x2a\x00\x0a\x01m"  # a tensor, then the name
    assert maybe_key(body, peek_request(body), ()) is None


def test_what_is_forgotten_for_want_of_memory_makes_room_for_what_comes_later() -> None:
    shares = Shares()
    shares.apply({"m": ShareSettings(cache_bytes=4000)})
    variant, known = Variant("v", "u", "net", ""), KnownModel("net", "")
    model = shares.table["m"]
    for digest in (b"a", b"b"):
        model.answered(variant, digest, answer(100), known, 0.0)
    assert [(now.answers, now.held) for now in shares.now()] == [(2, 2 * (100 + OVERHEAD))]
    shares.forget()
    assert [(now.answers, now.held) for now in shares.now()] == [(0, 0)]
    assert model.maybe_answer(variant, b"a", 1.0) is None
    model.answered(variant, b"a", answer(100), known, 1.0)
    assert model.maybe_answer(variant, b"a", 2.0) is not None
