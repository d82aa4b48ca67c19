"""Recall documents: the answer stands in the document, once, and only answers are marked."""

import re
from itertools import pairwise

import numpy as np
import pytest

from hinny import tokenizer
from hinny.config import SyntheticConfig
from hinny.data import names
from hinny.data.synthetic import (
    SYMBOLS,
    TRAINING,
    copy,
    copy_training,
    mqar,
    mqar_training,
    phonebook,
    phonebook_min_length,
    phonebook_training,
    symbols,
)
from hinny.errors import ConfigError, DataError

NUMBER = {4: r"[1-9]\d{3}", 7: r"[2-9]\d\d-[1-9]\d{3}", 10: r"[2-9]\d\d-[2-9]\d\d-[1-9]\d{3}"}
NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"
QUESTION = rf"What is the phone number for ({NAME})\?\nAnswer: (%s)"


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def coder(request, folder):
    return tokenizer.load(folder if request.param == "bpe" else "bytes")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def answers(example, coder):
    """The text of each stretch of answer tokens."""
    flags = np.flatnonzero(np.diff([False, *example.answers, False]))
    return [coder.decode(example.tokens[a:b]) for a, b in flags.reshape(-1, 2)]


def entries(text, digits):
    return dict(re.findall(rf"^({NAME}): ({NUMBER[digits]})$", text, re.MULTILINE))


@pytest.mark.parametrize("digits", [4, 7, 10])
def test_the_standard_phone_book_is_the_papers_form(coder, rng, digits):
    for _ in range(5):
        example = phonebook(rng, coder, length=700, digits=digits, form="standard")
        text = coder.decode(example.tokens)
        question = QUESTION % NUMBER[digits]
        form = rf"((?:{NAME}: {NUMBER[digits]}\n)+){question}\n{question}\n{question}"
        found = re.fullmatch(form, text)
        assert found, text
        book = entries(found[1], digits)
        assert len(book) == found[1].count("\n")
        asked = [(found[i], found[i + 1]) for i in (2, 4, 6)]
        assert all(book[name] == phone for name, phone in asked)
        assert len({name for name, _ in asked}) == 3
        assert answers(example, coder) == [asked[2][1]]


@pytest.mark.parametrize("digits", [4, 7, 10])
def test_the_reversed_phone_book_is_the_papers_form(coder, rng, digits):
    for _ in range(5):
        example = phonebook(rng, coder, length=1100, digits=digits, form="reversed")
        text = coder.decode(example.tokens)
        entry = rf"{NAME}: {NUMBER[digits]}\n"
        found = re.fullmatch(
            rf"Given a phone book with entries of the form:\n({entry}{entry})\.\.\. and so on\.\n"
            rf"Please find the phone number for (?P<name>{NAME})\.\nI will ask you for this phone number later\.\n"
            r"Memorize it so you can respond correctly\.\nRemember (?P=name)\.\nHere is the phonebook:\n\n"
            rf"((?:{entry})+)Okay, that is the end of the phonebook\.\n"
            r"Remember when I asked you to memorize the phone number for (?P=name)\?\n"
            rf"What is the phone number for (?P=name)\?\nAnswer: ({NUMBER[digits]})", text)
        assert found, text
        book = entries(found[3], digits)
        assert book[found["name"]] == found[4]
        assert set(entries(found[1], digits).items()) <= set(book.items())
        assert found["name"] not in entries(found[1], digits)
        assert answers(example, coder) == [found[4]]


@pytest.mark.parametrize("form", ["standard", "reversed"])
def test_a_phone_book_fills_its_length(coder, rng, form):
    for length in (800, 1000, 3000):
        sizes = [len(phonebook(rng, coder, length=length, digits=10, form=form).tokens) for _ in range(5)]
        # room for less than one more entry, of 31 bytes at most
        assert all(length - 31 < size <= length for size in sizes)


@pytest.mark.parametrize("form", ["standard", "reversed"])
def test_the_smallest_phone_book_can_always_be_written_and_a_smaller_one_never(coder, form):
    least = phonebook_min_length(coder, digits=10, form=form)
    for seed in range(30):
        example = phonebook(np.random.default_rng(seed), coder, length=least, digits=10, form=form)
        assert len(example.tokens) <= least
        assert len(entries(coder.decode(example.tokens), 10)) >= 3
    with pytest.raises(ConfigError, match=rf"a {form} phone book of 10-digit .* in {least - 1} tokens: .* {least}"):
        phonebook(np.random.default_rng(0), coder, length=least - 1, digits=10, form=form)


def test_the_number_asked_for_stands_anywhere_in_the_book(coder):
    places = []
    for seed in range(60):
        text = coder.decode(phonebook(np.random.default_rng(seed), coder, length=900, digits=4, form="standard").tokens)
        book = list(entries(text, 4))
        places.append(book.index(re.findall(r"for (.*)\?", text)[-1]) / (len(book) - 1))
    assert min(places) < 0.1
    assert max(places) > 0.9
    assert 0.35 < np.mean(places) < 0.65


def test_pieced_tokens_are_what_the_learnt_tokenizer_makes_of_the_whole_text(folder, rng):
    coder = tokenizer.load(folder)
    for form in ("standard", "reversed"):
        example = phonebook(rng, coder, length=900, digits=10, form=form)
        assert coder.encode(coder.decode(example.tokens)) == example.tokens


def test_answers_are_digits_one_by_one(coder, rng):
    example = phonebook(rng, coder, length=900, digits=10, form="standard")
    pieces = [coder.decode([t]) for t, answer in zip(example.tokens, example.answers, strict=True) if answer]
    assert len(pieces) == 12
    assert all(len(piece) == 1 for piece in pieces)


def test_practice_books_vary_in_size_form_and_questions_and_fit(coder):
    sizes, questions, reverse = [], [], 0
    for seed in range(80):
        example = phonebook_training(np.random.default_rng(seed), coder, length=900, digits=4)
        text = coder.decode(example.tokens)
        assert len(example.tokens) <= 900
        book = entries(text, 4)
        asked = re.findall(QUESTION % NUMBER[4], text)
        assert all(book[name] == phone for name, phone in asked)
        assert answers(example, coder) == [phone for _, phone in asked]
        assert len({name for name, _ in asked}) == len(asked) >= 1
        reverse += text.startswith("Given")
        sizes.append(len(book))
        questions.append(len(asked))
    assert 8 < reverse < 35
    assert min(sizes) == 2
    assert max(sizes) > 15
    assert max(questions) > 4


def test_without_room_practice_is_the_smallest_book(coder, rng):
    assert len(entries(coder.decode(phonebook_training(rng, coder, length=5, digits=10).tokens), 10)) == 2


def test_names_are_many_and_distinct():
    for listed in (names.FIRST.split(), names.LAST.split()):
        assert len(listed) == len(set(listed)) == 100


def test_copying_repeats_random_letters_behind_the_separator(coder, rng):
    for length in (4, 5, 64, 257):
        example = copy(rng, coder, length=length)
        n = (length - 2) // 2
        assert example.tokens[:n] == example.tokens[n + 2:]
        assert example.tokens[n:n + 2] == symbols(coder).separator
        assert example.answers == [False] * (n + 2) + [True] * n
    assert example.tokens != copy(rng, coder, length=257).tokens
    with pytest.raises(ConfigError, match="copy in 3 tokens"):
        copy(rng, coder, length=3)


def test_every_key_is_asked_for_once_and_its_value_is_the_answer(coder, rng):
    for pairs in (1, 8, 32):
        example = mqar(rng, coder, pairs=pairs)
        table = list(zip(example.tokens[0:2 * pairs:2], example.tokens[1:2 * pairs:2], strict=True))
        queries = list(zip(example.tokens[2 * pairs::2], example.tokens[2 * pairs + 1::2], strict=True))
        assert sorted(queries) == sorted(table)
        assert len(dict(table)) == pairs
        assert example.answers == [False] * 2 * pairs + [False, True] * pairs
    # asked in another order
    assert queries != table
    with pytest.raises(ConfigError, match="mqar with 33 pairs: this vocabulary has 32 keys"):
        mqar(rng, coder, pairs=33)


def test_alphabets_are_disjoint_ordinary_tokens(coder):
    s = symbols(coder)
    used = [*s.keys, *s.values, *s.letters, *s.separator]
    assert len(set(used)) == len(used)
    assert coder.eod not in used
    assert max(used) < coder.vocab_size
    assert len(s.keys) == len(s.values) == len(s.letters) == SYMBOLS == 32


def test_a_large_vocabulary_leaves_bytes_and_special_tokens_alone():
    large = tokenizer.ByteTokenizer()
    large.vocab_size, large.eod = 4096, 0
    s = symbols(large)
    assert len(s.keys) == SYMBOLS
    assert min(*s.keys, *s.values, *s.letters, *s.separator) >= 257
    tiny = tokenizer.ByteTokenizer()
    tiny.vocab_size, tiny.eod = 20, 19
    with pytest.raises(DataError, match="a vocabulary of 20 tokens is too small"):
        symbols(tiny)


@pytest.mark.parametrize("task", TRAINING)
def test_practice_is_a_function_of_the_generator_and_of_many_sizes(coder, task):
    config = SyntheticConfig(share=1.0, tasks={task: 1.0}, phonebook_digits=4)
    made = [[TRAINING[task](np.random.default_rng(seed), coder, 700, config) for seed in range(20)] for _ in range(2)]
    assert made[0] == made[1]
    sizes = sorted(len(example.tokens) for example in made[0])
    assert sizes[-1] <= 700
    assert sizes[-1] > 2 * sizes[0]
    assert all(a.tokens != b.tokens for a, b in pairwise(made[0]))
    assert all(len(e.tokens) == len(e.answers) and any(e.answers) for e in made[0])


def test_the_smallest_practice_is_given_where_there_is_no_room(coder, rng):
    assert len(mqar_training(rng, coder, 3).tokens) == 16
    assert len(copy_training(rng, coder, 3).tokens) == 18


@pytest.mark.parametrize(("digits", "form", "message"), [
    (5, "standard", "phone numbers of 5 digits; allowed: 4, 7, 10"),
    (4, "sideways", "form 'sideways'; allowed: standard, reversed"),
])
def test_unknown_forms_and_digits_are_refused(coder, rng, digits, form, message):
    with pytest.raises(ConfigError, match=message):
        phonebook(rng, coder, length=900, digits=digits, form=form)


def test_a_tokenizer_that_cannot_spell_a_book_is_refused(rng):
    class Lossy(tokenizer.ByteTokenizer):
        def encode_many(self, texts):
            return super().encode_many([text.replace("\n", " ") for text in texts])

    with pytest.raises(DataError, match="cannot spell a phone book exactly"):
        phonebook(rng, Lossy(), length=900, digits=4, form="standard")


def test_more_entries_than_names_are_refused(coder, rng):
    with pytest.raises(ConfigError, match="there are only 10000 names"):
        phonebook(rng, coder, length=1_000_000, digits=4, form="standard")
