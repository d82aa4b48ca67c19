"""Tasks of samples (`hinny.evals.task`) as entries of the table: samples → tokens → requests → answers → rows."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, cast

import numpy as np

from hinny import tokenizer as tokenizers
from hinny.errors import ConfigError, DataError
from hinny.evals.asking import Question, answers, questions
from hinny.evals.entry import Entry, LateReader, Length, Outcome, Rows, Subject, contents, work_done
from hinny.evals.intervals import interval
from hinny.evals.options import SEED
from hinny.evals.record import sample_line
from hinny.evals.task import Answer, Chosen, Marked, Sample, Setting, Task, Written
from hinny.infer.reading.requests import Generated, Progress, Reader
from hinny.run import row

ALL = 2**40
"""Samples of a task that has as many as its files."""
MARKS = 4
"""Samples of a task made at a length that stand for all of them when it is asked whether they are the same."""
CONTEXTS = ("context", "book")
"""Facts by which tasks say which samples are about one text."""


@dataclass(frozen=True)
class Defaults:
    """What the tasks of one module are run with where nothing is chosen."""

    samples: int = ALL
    lengths: tuple[int, ...] = ()


class MadeTask(Entry):
    """A `Task`."""

    def __init__(self, task: Task, defaults: Defaults, uses: Iterable[str] = ()) -> None:
        """uses: options that act on it beyond what its kind says: ruler_version, haystack."""
        self.task, self.defaults, self.extra = task, defaults, frozenset(uses)
        self.name, self.version, self.shots, self.metrics = task.name, task.version, task.shots, task.metrics

    @cached_property
    def uses(self) -> frozenset[str]:  # type: ignore[override]
        """By its kind: at a length or not, from files or from a seed."""
        files = {"data"} if self.needs() else set()
        made = {"lengths", "seed"} if self.task.sized else set() if files else {"seed"}
        return self.extra | files | made | {"samples", "truncate", "max_length", "save_samples", "batch_tokens"}

    def missing(self, subject: Subject) -> list[str]:
        return self.task.missing(self.setting(subject, self._chosen(subject)[0]))

    def needs(self) -> list[str]:
        length = self.defaults.lengths[0] if self.task.sized else None
        return self.task.missing(Setting(tokenizers.load("bytes"), samples=1, length=length))

    def _chosen(self, subject: Subject) -> Sequence[Length]:
        return (subject.options.lengths or self.defaults.lengths) if self.task.sized else (None,)

    def lengths(self, subject: Subject) -> tuple[list[Length], list[str]]:
        if not self.task.sized:
            return [None], []
        found: list[Length] = []
        short: list[str] = []
        for length in sorted({n for n in self._chosen(subject) if n is not None}):
            if (least := self.task.least(self.setting(subject, length))) <= length:
                found.append(length)
            else:
                short.append(f"{self.name} at {length} tokens: its shortest samples take {least:,} of this tokenizer")
        if not found:
            raise ConfigError(f"{'; '.join(short)}. Give larger --lengths.")
        return found, short

    def setting(self, subject: Subject, length: Length) -> Setting:
        """What the samples of one length depend on."""
        options = subject.options
        return Setting(subject.tokenizer, options.samples or self.defaults.samples, length,
                       SEED if options.seed is None else options.seed, options.data, options.haystack,
                       options.ruler_version or "head")

    def check(self, subject: Subject, lengths: Sequence[Length]) -> None:
        limit = subject.limit
        if limit.tokens is None:
            return
        longer = [n for n in lengths if n is not None and limit.exceeded(n)]
        if limit.policy != "error":
            # samples of a task are alike: where the first can be cut, all can
            for length in longer if self.task.sized else [None]:
                deque(self._questions(subject, length, MARKS), maxlen=0)
        elif longer:
            raise ConfigError(f"{self.name}: samples of {', '.join(map(str, longer))} tokens are longer than the "
                              f"{limit.tokens:,} that a sample may take. Give other --lengths, a larger "
                              "--max-length, or, for a task with a document to cut, --truncate middle or left.")
        elif not self.task.sized:
            deque(self._questions(subject, None), maxlen=0)

    def _questions(self, subject: Subject, length: Length, most: int | None = None) -> Iterator[Question]:
        """The first `most` samples in tokens; all without it."""
        samples = self.task.samples(self._first(subject, length, most))
        return questions(self.name, islice(samples, most), subject.tokenizer, subject.limit)

    def _first(self, subject: Subject, length: Length, most: int | None) -> Setting:
        """The setting with `most` samples, where that is fewer; a sample depends on its own index alone."""
        chosen = self.setting(subject, length)
        return chosen if most is None else replace(chosen, samples=min(most, chosen.samples))

    def key(self, subject: Subject) -> dict[str, Any]:
        options, setting = subject.options, self.setting(subject, None)
        extra: dict[str, Any] = {}
        if "ruler_version" in self.uses:
            extra["ruler_version"] = setting.ruler_version
        if "haystack" in self.uses:
            extra["haystack"] = "stand-in" if options.haystack is None else contents(options.haystack)
        # a limit that cuts nothing changes nothing
        limit = {} if subject.limit.policy == "error" else {"max_length": subject.limit.tokens}
        return {"version": self.version, "shots": self.shots, "seed": setting.seed if "seed" in self.uses else None,
                "samples": "all" if setting.samples == ALL else setting.samples,
                "truncate": subject.limit.policy, **limit, **extra}

    def fingerprint(self, subject: Subject, length: Length) -> str:
        some = MARKS if self.task.sized else None
        digest, n = hashlib.sha256(), 0
        for sample in islice(self.task.samples(self._first(subject, length, some)), some):
            digest.update(repr(_plain(sample)).encode())
            n += 1
        if n == 0:
            raise DataError(f"{self.name}: its data hold no sample; fetch them again.")
        subject.samples[self.name] = self.setting(subject, length).samples if self.task.sized else n
        return digest.hexdigest()

    def measure(self, subject: Subject, length: Length, progress: Progress) -> Outcome:
        save, found, saved = subject.options.save_samples, _Found(), []
        before = subject.usage()
        asked, reader = self._questions(subject, length), cast(Reader, LateReader(subject))
        for question, answer in answers(reader, self.task, asked, subject.samples[self.name], progress):
            scores = self.task.score(question.sample, answer)
            assert set(scores) <= set(self.metrics), f"{self.name} scored {sorted(scores)}"
            found.add(question, scores)
            if save:
                # as text: the tokens of long samples would take many times the room
                saved.append(sample_line(length, _saved(question, answer, scores, subject.tokenizer)))
        facts = {**found.facts(), **work_done(before, subject.usage(), found.prompts)}
        return Outcome(self._rows(subject, length, found), facts, saved)

    def _rows(self, subject: Subject, length: Length, found: _Found) -> Rows:
        rows = []
        for metric in self.metrics:
            places = [i for i, scores in enumerate(found.scores) if metric in scores]
            if not places:
                continue
            values = [found.scores[i][metric] for i in places]
            low, high = interval(values, [found.texts[i] for i in places])
            rows.append(row(f"{self.name}.{metric}", subject.recipe.name, math.fsum(values) / len(values), "share",
                            shape=self._shape(length, len(values), found.version or self.version), low=low, high=high,
                            device=subject.accelerator))
        return rows

    def _shape(self, length: Length, n: int, version: str) -> str:
        assert not set(version) & set(" ="), version
        return " ".join([*([f"length={length}"] if length is not None else []), f"n={n}", f"shots={self.shots}",
                         f"version={version}"])


class DepthTask(MadeTask):
    """A task whose samples say where in the text their answer stands: its first metric by depth as well."""

    BANDS = 5

    def _rows(self, subject: Subject, length: Length, found: _Found) -> Rows:
        """The rows of the task, and one for each fifth of the text that an answer stands in: `depth` in percent."""
        rows, metric = super()._rows(subject, length, found), self.metrics[0]
        for band in range(self.BANDS):
            places = [i for i, depth in enumerate(found.depths)
                      if depth is not None and min(int(depth * self.BANDS), self.BANDS - 1) == band]
            if not places:
                continue
            values = [found.scores[i][metric] for i in places]
            low, high = interval(values, [found.texts[i] for i in places])
            shape = f"length={length} depth={100 * (2 * band + 1) // (2 * self.BANDS)} n={len(values)}"
            rows.append(row(f"{self.name}.{metric}_by_depth", subject.recipe.name, math.fsum(values) / len(values),
                            "share", shape=shape, low=low, high=high, device=subject.accelerator))
        return rows


@dataclass
class _Found:
    """What is kept of each sample of a unit; its text and tokens are not."""

    scores: list[dict[str, float]] = field(default_factory=list)
    texts: list[Hashable] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    """Tokens."""
    longest: int = 0
    truncated: int = 0
    chances: list[float] = field(default_factory=list)
    depths: list[float | None] = field(default_factory=list)
    """Where in its text the answer of a sample stands, 0 to 1, if it says so."""
    version: str | None = None
    """Of a benchmark with several versions, a sample says which one it is of."""

    def add(self, question: Question, scores: dict[str, float]) -> None:
        """One more sample."""
        facts = question.sample.facts
        self.texts.append(_text(question.sample, len(self.scores)))
        self.scores.append(scores)
        self.prompts.append(len(question.prompt))
        self.longest = max(self.longest, question.size)
        self.truncated += question.truncated
        self.chances += [float(facts["chance"])] if "chance" in facts else []
        self.depths.append(float(facts["depth"]) if "depth" in facts else None)
        self.version = str(facts["ruler"]) if "ruler" in facts else None

    def facts(self) -> dict[str, Any]:
        """What is noted of the samples."""
        chance = {"chance": math.fsum(self.chances) / len(self.chances)} if self.chances else {}
        return {"samples": len(self.scores), "truncated": self.truncated, "longest_with_answer": self.longest, **chance}


def _text(sample: Sample, index: int) -> Hashable:
    """What tells the text that a sample is about from others; samples without one are each about their own."""
    for name in CONTEXTS:
        if name in sample.facts:
            return name, str(sample.facts[name])
    if isinstance(sample, Marked) or sample.document is None:
        return "sample", index
    return "document", hashlib.sha256(sample.prompt[slice(*sample.document)].encode()).digest()


def _plain(sample: Sample) -> list[Any]:
    """A sample as values that print the same in every process. Facts are of it: some hold what is scored against."""
    return [type(sample).__name__, *([part.name, _json(getattr(sample, part.name))] for part in fields(sample))]


def _saved(question: Question, answer: Answer, scores: dict[str, float],
           tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """A sample as it is written out, with the prompt that the model read."""
    sample = question.sample
    common = {"id": sample.id, "facts": _json(sample.facts), "scores": scores, "truncated": question.truncated,
              "prompt_tokens": len(question.prompt)}
    if isinstance(sample, Marked):
        assert isinstance(answer, list), type(answer)
        return common | {"tokens": list(sample.tokens), "answers": [int(i) for i in np.flatnonzero(sample.answers)],
                         "likeliest": answer[0].likeliest.tolist()}
    prompt = tokenizer.decode(question.prompt.tolist()) if question.truncated else sample.prompt
    if isinstance(sample, Written):
        assert isinstance(answer, Generated), type(answer)
        return common | {"prompt": prompt, "references": list(sample.references), "answer": answer.text,
                         "ended": answer.ended, "decoded": len(answer.tokens)}
    assert isinstance(sample, Chosen), type(sample)
    assert isinstance(answer, list), type(answer)
    return common | {"prompt": prompt, "choices": list(sample.choices), "right": sample.right,
                     "log_probabilities": [scored.total for scored in answer],
                     "greedy": [bool(scored.greedy) for scored in answer]}


def _json(value: Any) -> Any:
    """Facts as JSON has them: numpy's numbers are numbers, tuples lists."""
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
