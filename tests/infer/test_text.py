"""The text of tokens that come one by one is what decoding all of them says, and ends as the engine ends it."""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hinny.infer import text as texts
from hinny.infer.engine import Engine
from hinny.infer.reading.requests import Generate
from hinny.infer.reading.written import Writer
from hinny.infer.text import Text
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


def engine_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stop: tuple[str, ...]) -> str:
    """What `Engine.generate` writes when the model says `tokens`."""
    class Said(Engine):
        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def tokens(self, *_: object) -> Iterator[int]:
            return iter(tokens)

    class Whole(type(tokenizer)):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            return list(prompt)

    said = Said()
    said.tokenizer = object.__new__(Whole)
    said.tokenizer.__dict__ |= tokenizer.__dict__
    return said.generate("", max_tokens=len(tokens), stop=stop)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_writer_says_what_the_engine_says(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(SAMPLE * 3)
    cut = data.draw(st.integers(1, 60))
    # half of the time nonsense, whose bytes are no characters
    token = st.integers(0, tokenizer.vocab_size - 1)
    tokens = data.draw(st.just(ids[cut:cut + 100]) | st.lists(token, min_size=1, max_size=90))
    stop = data.draw(st.sampled_from([(), ("the",), ("\n\n", "€"), ("🦙 a", "5, 猫"), ("🦙",)]))
    writer = Writer(Generate(tuple(ids[:cut]), len(tokens), stop), tokenizer)
    used = next(i for i, token in enumerate(tokens, 1) if writer.take(token))
    assert writer.answer.text == engine_text(tokenizer, ids[:cut], tokens, stop)
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
