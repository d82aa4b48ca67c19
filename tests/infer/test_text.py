"""The text of tokens that come one by one is what decoding all of them says, and ends where that ends."""

from __future__ import annotations

import codecs
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer import text as texts
from hinny.infer.reading.requests import Generate
from hinny.infer.reading.written import Writer
from hinny.infer.text import Text, certain
from hinny.tokenizer import ByteTokenizer, Tokenizer, train_bpe

SAMPLE = "Größe: naïve €5, 猫がいる 🦙🦙 and the cat, the hat. 2024\n\n Done.  Two spaces"


class Pieces(ByteTokenizer):
    """Writes a mark for each byte of an unfinished character, as SentencePiece does."""

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="a mark for each")


codecs.register_error("a mark for each", lambda fault: ("\ufffd" * (fault.end - fault.start), fault.end))
TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "pieces": Pieces(), "bpe": train_bpe([SAMPLE * 3], 290)}


@pytest.fixture(scope="module")
def spaces() -> Tokenizer:
    """A tokenizer that writes no space in front of a text's first word, as SentencePiece."""
    class Spaces(Tokenizer):
        words = ("the", "cat", "sat", "é", "on")

        def __init__(self) -> None:
            super().__init__(b"spaces", vocab_size=6, eod=5)

        def encode_many(self, texts: list[str]) -> list[list[int]]:
            return [[self.words.index(word) for word in text.split()] for text in texts]

        def _decode(self, ids: list[int]) -> str:
            return " ".join(self.words[i] for i in ids)

        def _n_bytes(self, ids: list[int]) -> int:
            return len(self._decode(ids).encode())

    return Spaces()


def whole_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """The text of `tokens` behind the prompt up to its end, and how many of them it took, decoded anew for each."""
    text = ""
    for n, token in enumerate(tokens, 1):
        if token == tokenizer.eod:
            return text, n
        text = tokenizer.decode(prompt + tokens[:n])[len(tokenizer.decode(prompt)):]
        if hits := [at for word in stop if (at := text.find(word)) >= 0]:
            return text[:min(hits)], n
    return text, len(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_writer_says_what_decoding_everything_says(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(SAMPLE * 3)
    cut = data.draw(st.integers(1, 60))
    # half of the time nonsense, whose bytes are no characters
    token = st.integers(0, tokenizer.vocab_size - 1)
    tokens = data.draw(st.just(ids[cut:cut + 100]) | st.lists(token, min_size=1, max_size=90))
    stop = data.draw(st.sampled_from([(), ("the",), ("\n\n", "€"), ("🦙 a", "5, 猫"), ("🦙",)]))
    writer = Writer(Generate(tuple(ids[:cut]), len(tokens), stop), tokenizer)
    used = next(i for i, token in enumerate(tokens, 1) if writer.take(token))
    assert (writer.answer.text, used) == whole_text(tokenizer, ids[:cut], tokens, stop)
    assert writer.answer.tokens == tuple(tokens[:used])


def test_a_space_in_front_of_the_first_new_word_stays(spaces: Tokenizer) -> None:
    draw = random.Random(0)
    prompt, tokens = [draw.randrange(5) for _ in range(40)], [draw.randrange(5) for _ in range(100)]
    text = Text(spaces, prompt)
    for i, token in enumerate(tokens, 1):
        text.append(token)
        assert text.text == spaces.decode(prompt + tokens[:i])[len(spaces.decode(prompt)):]
    assert text.text.startswith(" ")


def test_decoding_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = ByteTokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    text, unread = Text(tokenizer, b"x" * 5000), Text(tokenizer, b"x" * 5000)
    for i, token in enumerate(b"abc " * 500, 1):
        text.append(token)
        unread.append(token)
        assert text.text == ("abc " * 500)[:i]
    assert max(lengths) <= 4 * texts.FRONT
    # a text that nobody looks at is decoded once
    lengths.clear()
    assert unread.text == "abc " * 500
    assert sum(lengths) <= 2000 + 4 * texts.FRONT


def test_the_text_behind_a_start_is_the_end_of_the_text() -> None:
    text = Text(ByteTokenizer(), b"x")
    for token in "é🦙 ab".encode() * 20 + b"\xf0\x9f" * 300 + b"end" + b"\xf0\x9f":
        text.append(token)
        for start in {0, text.fixed // 2, text.fixed, len(text.text) - 1, len(text.text)}:
            assert text.behind(start) == text.text[start:]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_a_character_behind_much_nonsense_is_whole(name: str) -> None:
    for marks in range(texts.MOST - 6, texts.MOST + 2):
        text, tokens = Text(TOKENIZERS[name], b"x"), b"\x80" * marks + "🦙é".encode()
        for token in tokens:
            text.append(token)
            assert text.behind(text.fixed) == text.text[text.fixed:]
        assert text.text == "\ufffd" * marks + "🦙é"


def test_fixed_characters_never_change() -> None:
    draw, seen = random.Random(3), 0
    for _ in range(10):
        text, fixed = Text(ByteTokenizer(), b"x"), ""
        for _ in range(800):
            text.append(draw.choice([0x80, 0xF0, 0x9F, 0xA6, 0x99, 0xC3, 0xA9, *b"ab"][:draw.choice([5, 9])]))
            assert text.text.startswith(fixed)
            fixed = text.text[:text.fixed]
        seen += len(fixed)
    assert seen > 1000


@given(st.text("ab\ufffd", max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_certain_ends_in_no_start_of_a_stop_string(text: str, stop: list[str]) -> None:
    whole = text.rstrip("\ufffd")
    held = max((n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])), default=0)
    assert certain(text, tuple(stop)) == whole[:len(whole) - held]
    assert certain(text, (), len(text)) == text


def written(text: str, **request: object) -> tuple[str, str, int]:
    """Text, why it ended and how many tokens it took, of a model that says `text` and then eod."""
    tokenizer = ByteTokenizer()
    writer = Writer(Generate((65,), **{"max_tokens": 99, **request}), tokenizer)
    for token in [*tokenizer.encode(text), tokenizer.eod]:
        if writer.take(token):
            break
    return writer.answer.text, writer.answer.ended, len(writer.answer.tokens)


def test_why_a_text_ends() -> None:
    assert written("one two") == ("one two", "eod", 8)
    assert written("one two", max_tokens=4) == ("one ", "length", 4)
    assert written("one two three", stop=("two", "ne t")) == ("o", "stop", 5)
    assert written("one two three", stop=(" two", "two")) == ("one", "stop", 7)
    assert written("one two", settled=lambda text: "tw" in text) == ("one tw", "settled", 6)


def test_settled_is_told_only_what_will_stay() -> None:
    told: list[str] = []
    written("aé.bx", stop=(".c",), settled=lambda text: bool(told.append(text)))
    # the point may begin the stop string, a byte of é is no character
    assert told == ["a", "aé", "aé.b", "aé.bx"]
