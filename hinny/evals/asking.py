"""Samples as a model is asked them: text to tokens, tokens to requests, and what comes back to the task's scores.

A choice is encoded together with its prompt, of which it may begin inside a word, and split where the prompt's own
tokens end; white space at a prompt's end belongs to its choices. An empty prompt is the end-of-document token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile

import numpy as np

from hinny.errors import ConfigError, DataError
from hinny.evals.task import Answer, Chosen, Marked, Sample, Task, Written
from hinny.evals.truncation import Limit, cut, too_long
from hinny.infer.reading.requests import Generate, Progress, Reader, Score
from hinny.tokenizer import Tokenizer

ENCODED_AT_ONCE, LETTERS_AT_ONCE = 256, 2**23
"""Samples that are encoded together, and letters of their texts (or tokens); an encoder takes 100 bytes a token."""
ASKED_AT_ONCE = 2**23
"""Tokens of the requests that a reader is given at once: a bound on memory, and what may be shared."""


@dataclass(frozen=True)
class Question:
    """A sample in tokens."""

    sample: Sample
    prompt: np.ndarray
    """(n,) int32; of a `Marked` all its tokens."""
    choices: tuple[np.ndarray, ...] = ()
    truncated: bool = False

    @property
    def answer(self) -> int:
        """Tokens that the answer takes at most."""
        if isinstance(self.sample, Written):
            return self.sample.max_tokens
        return max((len(choice) for choice in self.choices), default=0)

    @property
    def size(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + self.answer


def questions(name: str, samples: Iterable[Sample], tokenizer: Tokenizer, limit: Limit) -> Iterator[Question]:
    """The samples in tokens, some at a time, none longer than `limit`. ConfigError, with counts, if it says "error"."""
    found = (question for some in _groups(samples) for question in _encode(some, tokenizer))
    sizes: list[int] = []
    for question in found:
        sizes.append(question.size)
        if not limit.exceeded(question.size):
            yield question
        elif limit.policy == "error":
            raise too_long(name, limit, [*sizes, *(other.size for other in found)])
        else:
            yield _cut(name, question, tokenizer, limit)


def _groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    letters = 0
    for sample in samples:
        size = len(sample.tokens) if isinstance(sample, Marked) else sum(map(len, _texts(sample)))
        if group and (len(group) == ENCODED_AT_ONCE or letters + size > LETTERS_AT_ONCE):
            yield group
            group, letters = [], 0
        group.append(sample)
        letters += size
    if group:
        yield group


def _encode(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Question]:
    """All texts of the samples encoded in one call."""
    texts: dict[str, int] = {}
    for sample in samples:
        if not isinstance(sample, Marked):
            for text in _texts(sample):
                texts.setdefault(text, len(texts))
    ids = tokenizer.encode_many(list(texts))

    def question(sample: Sample) -> Question:
        if isinstance(sample, Marked):
            return Question(sample, _array(sample.tokens))
        prompt, *wholes = (ids[texts[text]] for text in _texts(sample))
        return _question(sample, prompt, wholes, tokenizer.eod)

    return [question(sample) for sample in samples]


def _texts(sample: Written | Chosen) -> list[str]:
    """What must be encoded: the prompt; of a choice, also the prompt with each."""
    if isinstance(sample, Written):
        return [sample.prompt]
    return [sample.prompt.rstrip(), *(sample.prompt + choice for choice in sample.choices)]


def _question(sample: Written | Chosen, prompt: list[int], wholes: Sequence[list[int]], eod: int,
              truncated: bool = False) -> Question:
    """wholes: of a choice, the tokens of prompt and choice together."""
    start = len(prompt)
    if (shortest := min(map(len, wholes), default=start + 1)) <= start:
        # a choice that melts into the last tokens of its prompt is scored with them
        same = takewhile(lambda column: len(set(column)) == 1, zip(prompt, *wholes, strict=False))
        start = min(len(list(same)), shortest - 1)
    if start < 0:
        raise DataError(f"sample {sample.id}: neither the prompt nor a choice has any text.")
    context = prompt[:start] or [eod]
    return Question(sample, _array(context), tuple(_array(whole[start:]) for whole in wholes), truncated)


def _cut(name: str, question: Question, tokenizer: Tokenizer, limit: Limit) -> Question:
    sample = question.sample
    if isinstance(sample, Marked):
        raise ConfigError(f"{name}: a sample takes {question.size:,} tokens, more than {limit.tokens:,}, and nothing "
                          "of it may be cut; give a larger --max-length.")
    prompt, *wholes = _texts(sample)
    document = sample.document and (sample.document[0], min(sample.document[1], len(prompt)))
    kept, rest = cut(name, limit, tokenizer, prompt, document, question.answer)
    if not wholes:
        return _question(sample, kept + rest, [], tokenizer.eod, truncated=True)
    assert document is not None, "what was cut has a document"
    behind = tokenizer.encode_many([whole[document[1]:] for whole in wholes])
    return _question(sample, kept + rest, [kept + tokens for tokens in behind], tokenizer.eod, truncated=True)


def _array(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def _ids(tokens: np.ndarray) -> tuple[int, ...]:
    return tuple(tokens.tolist())


def answers(reader: Reader, task: Task, asked: Iterable[Question], total: int,
            progress: Progress | None = None) -> Iterator[tuple[Question, Answer]]:
    """Each question with its answer, in their order. All of a group that fits in memory are asked together.

    No more than a group is held, so that a task may be larger than memory. total: of the questions, for `progress`.
    """
    done = 0
    for group in _by_size(asked):
        def report(n: int, of: int, done: int = done, size: int = len(group)) -> None:
            if progress is not None:
                # a choice is several requests
                progress(done + n * size // max(of, 1), total)

        yield from zip(group, _answer(reader, task, group, report), strict=True)
        done += len(group)
        # else two would be held while the next is made
        group.clear()


def _by_size(asked: Iterable[Question]) -> Iterator[list[Question]]:
    group: list[Question] = []
    tokens = 0
    for question in asked:
        size = max(1, len(question.choices)) * question.size
        if group and tokens + size > ASKED_AT_ONCE:
            yield group
            group, tokens = [], 0
        group.append(question)
        tokens += size
    if group:
        yield group


def _answer(reader: Reader, task: Task, group: Sequence[Question], progress: Progress) -> list[Answer]:
    """Of a task that has both kinds, what is to be written is asked together, and so is what is to be scored."""
    found: dict[int, Answer] = {}
    written = {i: _generate(task, question.sample, question.prompt) for i, question in enumerate(group)
               if isinstance(question.sample, Written)}
    if written:
        found |= zip(written, reader.generate(list(written.values()), progress), strict=True)
    scores = {i: _scores(question) for i, question in enumerate(group) if i not in written}
    if scores:
        scored = iter(reader.score(list(chain.from_iterable(scores.values())), progress))
        found |= {i: [next(scored) for _ in requests] for i, requests in scores.items()}
    return [found[i] for i in range(len(group))]


def _generate(task: Task, sample: Written, prompt: np.ndarray) -> Generate:
    return Generate(_ids(prompt), sample.max_tokens, sample.stop, partial(task.settled, sample))


def _scores(question: Question) -> list[Score]:
    if isinstance(question.sample, Marked):
        return [Score(question.sample.tokens[:1], question.sample.tokens[1:])]
    tokens = _ids(question.prompt)
    return [Score(tokens, _ids(choice)) for choice in question.choices]
