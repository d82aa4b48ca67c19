"""Phone books as text: their prompts, lengths, depths and scores."""

from __future__ import annotations

import io
import itertools
import re
import time

import numpy as np
import pytest
import sentencepiece
import tokenizers
from oracle_phonebook import phonebook_answer

from hinny.data import phonebook as tokens_of_books
from hinny.errors import ConfigError
from hinny.evals import phonebook_books as books
from hinny.evals.phonebook import TASKS
from hinny.evals.task import Setting, Task, Written
from hinny.infer.reading.requests import Generated
from hinny.tokenizer import ByteTokenizer, JSONTokenizer, SentencePieceTokenizer, Tokenizer

IDS = [task.name for task in TASKS]
STANDARD, REVERSED, JELASSI = TASKS


def _corpus() -> list[str]:
    rng = np.random.default_rng(0)
    people = zip(rng.choice(tokens_of_books.FIRST, 900), rng.choice(tokens_of_books.LAST, 900),
                 books.Form("standard").phones(rng, 900), strict=True)
    return [f"{first} {last}: {phone}" for first, last, phone in people] + list(tokens_of_books.PHRASES.values())


def _bpe(byte_level: bool) -> Tokenizer:
    """Byte-level BPE, or one whose tokens reach over words and lines."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet, texts = [*map(chr, range(32, 127)), "\n"], _corpus()
    inner.decoder = tokenizers.decoders.Fuse()
    if byte_level:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder, alphabet = tokenizers.decoders.ByteLevel(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        texts = ["\n".join(texts[i:i + 30]) for i in range(0, len(texts), 30)]
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False))
    return JSONTokenizer(inner.to_str().encode(), "test")


def _unigram() -> Tokenizer:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(_corpus()).splitlines()), model_writer=file, vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False)
    return SentencePieceTokenizer(file.getvalue(), "test")


@pytest.fixture(scope="module")
def tokenizer_of() -> dict[str, Tokenizer]:
    return {"bytes": ByteTokenizer(), "byte-level": _bpe(True), "across lines": _bpe(False), "unigram": _unigram()}


def made(task: Task, tokenizer: Tokenizer, length: int, n: int = 12) -> list[Written]:
    found = list(task.samples(Setting(tokenizer, n, length)))
    assert all(isinstance(sample, Written) for sample in found)
    return [sample for sample in found if isinstance(sample, Written)]


def said(text: str) -> Generated:
    return Generated((), text, "eod")


def test_the_standard_form_is_the_papers() -> None:
    ada, bob, cy = (books.Person(name, f"234-567-890{i}") for i, name in enumerate(["Ada A", "Bob B", "Cy C"], 1))
    assert books.Form("standard").frame([ada, bob], cy) == ("", (
        "What is the phone number for Ada A?\nAnswer: 234-567-8901\n"
        "What is the phone number for Bob B?\nAnswer: 234-567-8902\n"
        "What is the phone number for Cy C?\nAnswer:"))
    assert books.Form("jelassi").frame([ada, bob], cy) == ("", "\nAda A: 234-567-8901\nBob B: 234-567-8902\n\nCy C:")


def test_the_reversed_form_is_the_papers_with_the_line_of_the_answer() -> None:
    ada, bob, cy = (books.Person(name, f"234-567-890{i}") for i, name in enumerate(["Ada A", "Bob B", "Cy C"], 1))
    assert books.Form("reversed").frame([ada, bob], cy) == (
        "Given a phone book with entries of the form:\nAda A: 234-567-8901\nBob B: 234-567-8902\n... and so on.\n"
        "Please find the phone number for Cy C.\nI will ask you for this phone number later.\n"
        "Memorize it so you can respond correctly.\nRemember Cy C.\nHere is the phonebook:\n\n",
        "Okay, that is the end of the phonebook.\nRemember when I asked you to memorize the phone number for Cy C?\n"
        "What is the phone number for Cy C?\nAnswer:")


@pytest.mark.parametrize(("task", "form"), [(STANDARD, "standard"), (REVERSED, "reversed")], ids=IDS[:2])
def test_the_text_is_that_of_the_books_for_training(task: Task, form: str) -> None:
    tokenizer, number = ByteTokenizer(), r"\d{3}-\d{3}-\d{4}"
    example = tokens_of_books.phonebook(np.random.default_rng(1), tokenizer, length=900, digits=10, form=form)

    def shape(text: str) -> str:
        names = sorted(tokens_of_books.LAST, key=len, reverse=True)
        text = re.sub(rf"\b({'|'.join(tokens_of_books.FIRST)}) ({'|'.join(names)})\b", "NAME", text)
        return re.sub(rf"(NAME: {number}\n)+", "ENTRIES\n", text)

    training = shape(tokenizer.decode(example.tokens))
    ours = shape(made(task, tokenizer, 900)[0].prompt + " 234-567-8901")
    assert re.sub(number, "N", training) == re.sub(number, "N", ours)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "across lines", "unigram"])
def test_prompt_and_answer_fill_the_length_to_an_entry_and_a_longer_name(
        task: Task, kind: str, tokenizer_of: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizer_of[kind]
    least = task.least(Setting(tokenizer, 1))
    for length in (least, least + 1, least + 40, 1024, 4096):
        samples = made(task, tokenizer, length)
        counts = [len(tokenizer.encode(sample.prompt)) for sample in samples]
        assert [sample.facts["tokens"] for sample in samples] == counts
        for _, group in itertools.groupby(zip(samples, counts, strict=True), key=lambda pair: pair[0].facts["book"]):
            room = length - books.ANSWER_TOKENS - max(count for _, count in group)
            # the reversed form names five times who is asked for
            assert 0 <= room < (80 if task is REVERSED else 40), (kind, length)


def test_a_length_below_the_least_is_refused() -> None:
    setting = Setting(ByteTokenizer(), 1, STANDARD.least(Setting(ByteTokenizer(), 1)) - 1)
    with pytest.raises(ConfigError, match="this tokenizer needs 304 or more"):
        list(STANDARD.samples(setting))
    with pytest.raises(ConfigError, match="give one"):
        list(STANDARD.samples(Setting(ByteTokenizer(), 1)))


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_long_books_have_different_names_and_take_no_time(task: Task, tokenizer_of: dict[str, Tokenizer]) -> None:
    for kind, length in (("byte-level", 131_072), ("bytes", 1_048_576)):
        tokenizer = tokenizer_of[kind]
        began = time.process_time()
        samples = made(task, tokenizer, length, 2)
        assert time.process_time() - began < 10
        assert length - 60 < samples[0].facts["tokens"] + books.ANSWER_TOKENS <= length
        names = re.findall(r"^(?!Answer)(.+): [\d-]+$", samples[0].prompt, flags=re.MULTILINE)
        shown = 0 if task is STANDARD else books.SHOWN
        assert len(names) - shown == len(set(names)) == samples[0].facts["entries"] > 8000


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_no_prompt_ends_in_white_space_and_the_two_forms_have_the_same_people(task: Task) -> None:
    sample, other = made(task, ByteTokenizer(), 2048)[0], made(STANDARD, ByteTokenizer(), 2048)[0]
    assert sample.prompt.endswith(":")
    assert sample.document is None, "nothing of a book may be cut"
    if task is REVERSED:
        assert set(re.findall(r"^(.+): \d", sample.prompt, flags=re.MULTILINE)) - {"Answer"} <= set(
            re.findall(r"^(.+): \d", other.prompt, flags=re.MULTILINE))


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_depth_is_where_the_entry_stands_and_depths_are_even(task: Task) -> None:
    samples = made(task, ByteTokenizer(), 4096, 100)
    for sample in samples:
        lines = [line for line in sample.prompt.split("\n") if line.endswith(sample.references[0])]
        book = sample.prompt.split("phonebook:\n\n")[-1].split("\n")
        entries = sample.facts["entries"]
        assert book.index(lines[-1]) == round(sample.facts["depth"] * (entries - 1))
    for n in (10, 20, 100):
        counts, _ = np.histogram([sample.facts["depth"] for sample in samples[:n]], bins=5, range=(0, 1))
        assert counts.max() - counts.min() <= 2, counts
    assert [sample.facts["book"] for sample in samples] == [i // books.QUERIES for i in range(100)]
    for _, group in itertools.groupby(samples, key=lambda sample: sample.facts["book"]):
        assert len({sample.references for sample in group}) == books.QUERIES, "nobody is asked for twice"


def test_questions_to_one_standard_book_share_all_but_the_last_line() -> None:
    first, *others = (sample.prompt for sample in made(STANDARD, ByteTokenizer(), 4096, books.QUERIES))
    head = first.rpartition("What is the phone number for")[0]
    assert all(other.startswith(head) for other in others)
    assert len(head) > 3900


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_samples_depend_on_length_seed_and_number_alone(task: Task) -> None:
    def drawn(n: int, length: int, seed: int) -> list[Written]:
        return [s for s in task.samples(Setting(ByteTokenizer(), n, length, seed)) if isinstance(s, Written)]

    assert drawn(25, 900, 1)[:7] == drawn(7, 900, 1)
    assert len({drawn(1, length, seed)[0].prompt for length, seed in ((900, 1), (900, 2), (901, 1))}) == 3
    assert [sample.id for sample in drawn(25, 900, 1)] == [str(i) for i in range(25)]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("length", [600, 4096])
def test_who_reads_the_book_scores_one_and_who_does_not_none(task: Task, length: int) -> None:
    for sample in made(task, ByteTokenizer(), length, 15):
        answer = phonebook_answer(sample.prompt)
        assert task.score(sample, said(answer)) == {"exact": 1, "found": 1, "digits": 1}
        assert task.settled(sample, answer)
        assert task.score(sample, said(" I do not know.\n")) == {"exact": 0, "found": 0, "digits": 0}
        assert len(ByteTokenizer().encode(answer)) <= sample.max_tokens


def test_a_number_is_found_anywhere_but_exact_only_alone_in_the_first_line() -> None:
    sample = Written("0", "", ("234-567-8901",), 32)
    scores = {text: tuple(STANDARD.score(sample, said(text)).values()) for text in (
        "\n234-567-8901", " It is 234-567-8901.", " 234-567-8901 or 999-999-9999", " 234-567-8999\n234-567-8901",
        " 2345678901", " 234-567", "")}
    assert scores == {"\n234-567-8901": (0, 1, 1), " It is 234-567-8901.": (0, 1, 1),
                      " 234-567-8901 or 999-999-9999": (0, 1, 1), " 234-567-8999\n234-567-8901": (0, 0, 0.8),
                      " 2345678901": (0, 0, 1), " 234-567": (0, 0, 0.6), "": (0, 0, 0)}


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_what_is_settled_cannot_change(task: Task) -> None:
    number = "6234567890" if task is JELASSI else "623-456-7890"
    sample = Written("0", "", (number,), 32)
    wrong = number[:-1] + "1"
    assert not task.settled(sample, f" {number}"), "what follows decides whether the line is the number alone"
    assert not task.settled(sample, " The number\nof")
    for text in (f" {number}\n", f" {wrong}", f"\n{number}", f" It is {number}"):
        assert task.settled(sample, text), text
        for more in ("0", "\n", " and", f"\n{number}", f" {wrong}"):
            assert task.score(sample, said(text + more)) == task.score(sample, said(text)), (text, more)
