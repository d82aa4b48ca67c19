"""Pieces of text that are delivered: together the text up to its end, at every moment nothing that would change."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer.delivery import Writing
from hinny.infer.request import Choice, Delivery, Request
from hinny.tokenizer import ByteTokenizer, Tokenizer, train_bpe

SAMPLE = "Größe: naïve €5, 猫がいる 🦙🦙 and the cat, the hat. 2024\n\n Done.  Two spaces"
TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "bpe": train_bpe([SAMPLE * 3], 290)}
BYTES = TOKENIZERS["bytes"]


def writing(tokenizer: Tokenizer = BYTES, max_tokens: int = 10_000, **request: object) -> Writing:
    return Writing(7, Request(prompt=(65,), max_tokens=max_tokens, **request), 2, tokenizer)


def run(one: Writing, tokens: list[int]) -> list[Delivery]:
    """Deliveries of these tokens, as far as they are taken."""
    pieces = []
    for token in tokens:
        pieces.append(one.take(Choice(token)))
        if one.ended:
            break
    return pieces


def joined(pieces: list[Delivery]) -> str:
    return "".join(piece.text for piece in pieces)


def wanted(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...], max_tokens: int) -> tuple[str, str, int]:
    """Text, end and number of tokens, from the decoded whole after each token."""
    text = ""
    for n, token in enumerate(tokens, 1):
        last = token == tokenizer.eod or n == max_tokens
        text = tokenizer.decode(tokens[:n])
        finished = text if last else text.rstrip("\ufffd")
        if hits := [at for word in stop if (at := finished.find(word)) >= 0]:
            return text[:min(hits)], "stop", n
        if last:
            return text, "stop" if token == tokenizer.eod else "length", n
    raise AssertionError("no end")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_deliveries_add_up_to_the_text_before_its_end(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    letters = st.sampled_from("ab é猫🦙\ufffd")
    text = data.draw(st.text(letters, max_size=60))
    nonsense = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=80)
    tokens = [*data.draw(st.just(tokenizer.encode(text)) | nonsense), tokenizer.eod]
    stop = tuple(data.draw(st.lists(st.text(letters, min_size=1, max_size=4), max_size=3)))
    most = data.draw(st.just(1000) | st.integers(1, 60))
    pieces = run(one := writing(tokenizer, most, stop=stop), tokens)
    whole, ended, n = wanted(tokenizer, tokens, stop, most)
    assert (joined(pieces), one.ended, len(pieces)) == (whole, ended, n)
    assert [p.ended for p in pieces] == [None] * (n - 1) + [ended]
    assert [c.token for p in pieces for c in p.choices] == tokens[:n]


@given(st.text("abc é猫🦙", max_size=80), st.text("abc é猫🦙", min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_stop_string_ends_the_text_where_find_finds_it(text: str, word: str) -> None:
    pieces = run(writing(stop=(word,)), [*text.encode(), BYTES.eod])
    assert joined(pieces) == text[:text.find(word) if word in text else None]


@given(st.text("ab é🦙", max_size=60), st.text("ab é🦙", min_size=2, max_size=4))
@settings(max_examples=100, deadline=None)
def test_only_what_may_be_a_stop_string_or_a_character_is_held_back(text: str, word: str) -> None:
    one, told = writing(stop=(word,)), ""
    for i, token in enumerate(text.encode(), 1):
        told += one.take(Choice(token)).text
        if one.ended:
            return
        so_far = text.encode()[:i].decode(errors="ignore")
        held = max((n for n in range(1, len(word)) if so_far.endswith(word[:n])), default=0)
        assert told == so_far[:len(so_far) - held]


def test_an_unfinished_character_is_told_at_the_end_alone() -> None:
    llama = list("🦙".encode())
    assert [p.text for p in run(writing(max_tokens=4), [97, *llama[:3]])] == ["a", "", "", "\ufffd"]
    assert [p.text for p in run(writing(), [97, *llama[:2], BYTES.eod])] == ["a", "", "", "\ufffd"]
    assert [p.text for p in run(writing(), [*llama[:2], 98, *llama])] == ["", "", "\ufffdb", "", "", "", "🦙"]


def test_the_first_stop_string_to_be_complete_ends_the_text() -> None:
    assert joined(run(writing(stop=("abcd", "bc")), list(b"xabcd"))) == "xa"
    assert joined(run(writing(stop=(" two", "two")), list(b"one two"))) == "one"


def test_the_end_of_the_document_ends_unless_ignored() -> None:
    tokens = [97, BYTES.eod, 98, 99]
    pieces = run(writing(max_tokens=3), tokens)
    assert (joined(pieces), pieces[-1].ended, len(pieces)) == ("a", "stop", 2)
    pieces = run(writing(max_tokens=3, ignore_eod=True), tokens)
    assert (joined(pieces), pieces[-1].ended, len(pieces)) == ("ab", "length", 3)
    # the last token allowed
    assert run(writing(max_tokens=1), [BYTES.eod])[-1].ended == "stop"
    assert run(writing(max_tokens=1, ignore_eod=True), [BYTES.eod])[-1].ended == "length"
    assert run(writing(max_tokens=2, stop=("b",)), [97, 98])[-1].ended == "stop"


@pytest.mark.parametrize("ended", ["cancelled", "failed"])
def test_one_that_ends_before_its_time_tells_what_was_held_back(ended: str) -> None:
    one = writing(stop=("bcd",))
    one.cached = 5
    pieces = run(one, [97, 98, 99, *"é".encode()[:1]])
    assert [p.text for p in pieces] == ["a", "", "", ""]
    last = one.finish(ended, "why")
    assert last == Delivery(7, 2, "bc\ufffd", (), ended, "why", cached=5)
    with pytest.raises(AssertionError):
        one.take(Choice(97))


def test_a_stop_string_found_at_the_very_end_is_not_told_either() -> None:
    for most, ended in ((2, "stop"), (3, "cancelled")):
        one = writing(max_tokens=most, stop=("\ufffd",))
        pieces = run(one, [97, 0xC3])
        pieces += [] if one.ended else [one.finish("cancelled")]
        assert (joined(pieces), one.ended) == ("a", ended)


def test_a_delivery_names_its_continuation_and_carries_each_choice_once() -> None:
    choices = [Choice(97 + i, -0.5 * i, ((1, -2.0),)) for i in range(5)]
    one = writing(max_tokens=5)
    pieces = [one.take(choice) for choice in choices]
    assert [p.choices for p in pieces] == [(choice,) for choice in choices]
    assert {(p.request, p.index, p.cached, p.message) for p in pieces} == {(7, 2, 0, "")}


@pytest.mark.parametrize("kind", ["text", "marks", "held"])
def test_a_token_of_a_long_text_costs_as_much_as_one_of_a_short_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    tokenizer, lengths = ByteTokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    tokens = {"text": b"abc " * 1000, "marks": b"\x80" * 4000, "held": b"\xf0\x9f\xa6" * 1300}[kind]
    pieces = run(one := writing(tokenizer, stop=("ab" * 40, "\n\n")), list(tokens))
    assert joined(pieces) + one.finish("cancelled").text == tokens.decode(errors="replace")
    assert max(lengths) <= 300
    # something is told now and then, also of nonsense
    assert sum(bool(p.text) for p in pieces) > 10


def test_long_texts_with_long_marks_stay_whole() -> None:
    draw = random.Random(1)
    for _ in range(20):
        tokens = [draw.choice([0x80, 0xF0, 0x9F, 0xA6, 0x99, 0xC3, 0xE7]) for _ in range(900)] + list("🦙é".encode())
        pieces = run(writing(max_tokens=len(tokens)), tokens)
        assert joined(pieces) == bytes(tokens).decode(errors="replace")
