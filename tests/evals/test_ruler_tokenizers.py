"""RULER with tokenizers that count unlike the usual ones: a space in front of all, tokens over words, lines, digits."""

from __future__ import annotations

import functools
import importlib
import io

import numpy as np
import pytest
import sentencepiece
import tokenizers
from oracles import ruler_answer
from ruler_settings import VERSIONS, bpe, made_anew, setting

from hinny.evals.ruler import TASKS, RulerTask, words
from hinny.infer.reading.requests import Generated
from hinny.tokenizer import JSONTokenizer, SentencePieceTokenizer, Tokenizer


@functools.cache
def _texts() -> tuple[str, ...]:
    """What the tokenizers learn from, so that they merge what RULER repeats."""
    given = setting(3000, samples=1)
    return tuple(sample.prompt for task in TASKS for sample in task.samples(given))  # type: ignore[union-attr]


def _sentencepiece(kind: str) -> Tokenizer:
    """With a space in front of every text; "unigram" makes one space of all white space, line breaks included."""
    file = io.BytesIO()
    lines = [line[i:i + 2000] for text in _texts() for line in text.splitlines() for i in range(0, len(line), 2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=800, model_type=kind, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc" if kind == "unigram" else "identity")
    return SentencePieceTokenizer(file.getvalue(), "test")


def _across() -> Tokenizer:
    """BPE over whole texts: its tokens begin and end inside words, and hold spaces, line breaks and several digits."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.decoder = tokenizers.decoders.Fuse()
    inner.train_from_iterator([text[i:i + 300] for text in _texts() for i in range(0, len(text), 300)],
                              tokenizers.trainers.BpeTrainer(vocab_size=1200, special_tokens=["<|endoftext|>"],
                                                             initial_alphabet=[*map(chr, range(32, 127)), "\n"],
                                                             max_token_length=9, show_progress=False))
    return JSONTokenizer(inner.to_str().encode(), "test")


MAKERS = {"unigram": lambda: _sentencepiece("unigram"), "bpe with a prefix": lambda: _sentencepiece("bpe"),
          "across lines": _across}


@functools.cache
def _tokenizer(kind: str) -> Tokenizer:
    return MAKERS[kind]()


def test_the_tokenizers_are_as_odd_as_they_should_be() -> None:
    across, unigram = _tokenizer("across lines"), _tokenizer("unigram")
    assert any("\n" in (piece := across.decode([i])) and len(piece) > 2 for i in range(across.vocab_size))
    assert unigram.encode("a \n\n b") == unigram.encode("a b")
    first, _, last = _tokenizer("bpe with a prefix").encode("a\na")
    assert first != last


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("kind", MAKERS)
def test_samples_fit_fill_and_can_be_answered(kind: str, task: RulerTask, version: str) -> None:
    tokenizer = _tokenizer(kind)
    least = task.least(setting(1, version, samples=2, tokenizer=tokenizer))
    for length in (least, 3000):
        for sample in made_anew(task, setting(length, version, samples=2, tokenizer=tokenizer)):
            tokens = len(tokenizer.encode(sample.prompt))
            assert sample.facts["tokens"] == tokens
            assert tokens + sample.max_tokens <= length
            if length == 3000 and version == "head":
                assert tokens + sample.max_tokens >= 0.94 * length
            answer = Generated((1,), ruler_answer(sample.prompt), "eod")
            assert task.score(sample, answer) == {task.metrics[0]: 1.0}


def test_words_are_the_packages_own_and_one_answer_each() -> None:
    """Its files have words with a space behind them, which it trims, and "Early" beside "early"."""
    read = importlib.import_module("wonderwords.random_word")._get_words_from_text_file
    theirs = {word for kind in ("noun", "adjective", "verb") for word in read(f"{kind}list.txt")}
    found = words.vocabulary()
    assert theirs - set(found) == {"Early"}
    assert set(found) <= theirs
    assert len({word.lower() for word in found}) == len(found)
    drawn = {pair for pair in words.pairs(np.random.default_rng(0), 50_000) if " " in pair}
    assert not any(" -" in pair or pair != pair.strip() for pair in drawn)


def test_no_two_tasks_or_samples_draw_the_same() -> None:
    """Neither a seed nor a sample comes twice, over tasks, lengths and indices."""
    given = [setting(length, samples=12, tokenizer=bpe()) for length in (1500, 1501)]
    drawn = [tuple(one.rng(task.name, index).integers(2**63, size=2)) for one in given for task in TASKS
             for index in range(400)]
    assert len(set(drawn)) == len(drawn)
    for task in TASKS:
        samples = [sample for one in given for sample in made_anew(task, one)]
        assert len({sample.prompt for sample in samples}) == len(samples)
