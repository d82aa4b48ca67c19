"""NarrativeQA, Qasper and QuALITY as SCROLLS has them (Shaham et al. 2022, arXiv 2201.03533), asked as lm-eval does.

A row's input is the question, an empty line and the text; the prompt is text, question, "Answer:". Rows of one id give
its references. The validation rows are used: the test rows have no answers. Questions on one text come one after the
other, so that the text is read once.

Scores are lm-eval's. In Qasper a question whose every reference is "yes" or "no" is a choice between the two; the
others are written, and nothing written counts as "Unanswerable". `qasper-written` writes all of them, as SCROLLS itself
does. lm-eval ends an answer at its first newline, also if that is its first character; `f1_first_line` scores the first
line after leading newlines. `em` of QuALITY, the SCROLLS score, takes the choice of greatest log-probability per
character; `acc` that of the greatest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from hinny.errors import ConfigError, DataError
from hinny.evals import long_files, metrics
from hinny.evals.task import Answer, Chosen, Sample, Setting, Task, Written
from hinny.infer.reading.requests import Generated

REPOSITORY = "tau/scrolls"
MAX_TOKENS = 256
"""Of an answer: what lm-eval leaves to a model that is not told."""

YES_NO = (" yes", " no")
_LETTER = re.compile(r" *\([A-D]\) *")


@dataclass
class _Question:
    id: str
    question: str
    text: str
    outputs: list[str] = field(default_factory=list)
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scrolls:
    """A task whose answers are written, or chosen if all references are yes or no."""

    name: str
    file: str
    """Name of the zip and of the folder in it."""
    size: str
    licence: str
    metrics: tuple[str, ...] = ("f1", "f1_first_line")
    choose_yes_no: bool = False
    empty: str = ""
    """What an answer without a word stands for."""
    version: str = "1"
    shots: int = 0
    sized: bool = False

    def missing(self, setting: Setting) -> list[str]:
        """The data, if they are not there, with the command that fetches them."""
        if setting.data is not None and self._source(setting.data):
            return []
        folder = f"{setting.data if setting.data is not None else 'ROOT'}/{REPOSITORY}"
        given = "" if setting.data is not None else "no folder of data sets is given (--data ROOT); "
        return [f"{self.name}: {given}{folder}/{self.file}.zip ({self.size}; {self.licence}): hf download --repo-type "
                f"dataset {REPOSITORY} {self.file}.zip --local-dir {folder}"]

    def least(self, setting: Setting) -> int:
        """0: its samples have the length that they have."""
        return 0

    def samples(self, setting: Setting) -> Iterator[Sample]:
        """The first questions, those on one text together. ConfigError if the file is not there."""
        source = self._source(setting.data) if setting.data is not None else None
        if source is None:
            raise ConfigError(f"data is missing: {self.missing(setting)[0]}")
        for question in islice(self._questions(source), setting.samples):
            yield self._sample(question)

    def settled(self, sample: Written, text: str) -> bool:
        """Once the first line that is not empty is complete."""
        return metrics.first_line_stands(text)

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """F1 of the text before the first newline, and of the first line after leading newlines, each 0 to 1."""
        if isinstance(sample, Chosen):
            assert isinstance(answer, list), answer
            yes, no = (scored.total for scored in answer)
            value = metrics.f1("yes" if yes > no else "no", sample.facts["references"])
            return {"f1": value, "f1_first_line": value}
        assert isinstance(sample, Written), sample
        assert isinstance(answer, Generated), answer
        lines = answer.text.split("\n", 1)[0], metrics.first_line(answer.text)
        strict, lenient = (metrics.f1(line if line.strip() else self.empty, sample.references) for line in lines)
        return {"f1": strict, "f1_first_line": lenient}

    def _source(self, root: Path) -> long_files.Source | None:
        folder, member = root / REPOSITORY, f"{self.file}/validation.jsonl"
        return long_files.find(folder / member, folder / f"{self.file}.zip", member)

    def _questions(self, source: long_files.Source) -> Iterator[_Question]:
        """Questions in the order of the texts' first ones; each text is held once, however many ask about it."""
        found: dict[str, _Question] = {}
        by_text: dict[str, list[_Question]] = {}
        for number, record in enumerate(source.records(), 1):
            where = f"{source.paths[0]}, row {number}"
            row_id, output = (long_files.field(record, name, str, where) for name in ("id", "output"))
            if row_id not in found:
                question = self._parse(row_id, long_files.field(record, "input", str, where), where)
                same = by_text.setdefault(question.text, [])
                same.append(replace(question, text=same[0].text) if same else question)
                found[row_id] = same[-1]
            found[row_id].outputs.append(output)
        return chain.from_iterable(by_text.values())

    def _parse(self, row_id: str, text: str, where: str) -> _Question:
        question, gap, rest = text.partition("\n\n")
        if not gap:
            raise DataError(f"{where}: no empty line between question and text; fetch the file again.")
        return _Question(row_id, question, rest)

    def _sample(self, asked: _Question) -> Sample:
        prompt, document = f"{asked.text}\n\nQuestion: {asked.question}\nAnswer:", (0, len(asked.text))
        if self.choose_yes_no and all(metrics.normalise(output) in ("yes", "no") for output in asked.outputs):
            right = YES_NO.index(f" {metrics.normalise(asked.outputs[0])}")
            return Chosen(asked.id, prompt, YES_NO, right, {"references": tuple(asked.outputs)}, document)
        return Written(asked.id, prompt, tuple(asked.outputs), MAX_TOKENS, document=document)


@dataclass(frozen=True)
class Quality(Scrolls):
    """Four choices, of which one is right."""

    metrics: tuple[str, ...] = ("em", "acc")

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """1 for the right choice, 0 for another."""
        assert isinstance(sample, Chosen), sample
        assert isinstance(answer, list), answer
        totals = np.array([scored.total for scored in answer])
        # a choice's length is that of its text, without the space in front of it
        lengths = np.array([len(choice) - 1 for choice in sample.choices])
        return {"em": float(np.argmax(totals / lengths) == sample.right),
                "acc": float(np.argmax(totals) == sample.right)}

    def _parse(self, row_id: str, text: str, where: str) -> _Question:
        asked = super()._parse(row_id, text, where)
        options, gap, rest = _cut(asked.text)
        choices = tuple(" ".join(part.split()) for part in _LETTER.split(options)[1:])
        if not gap or len(choices) < 2 or not all(choices):
            raise DataError(f"{where}: no choices (A) to (D) and an empty line before the text; fetch the file again.")
        return replace(asked, text=rest.strip(), choices=choices)

    def _sample(self, asked: _Question) -> Sample:
        answer = " ".join(asked.outputs[0].split())
        if answer not in asked.choices:
            raise DataError(f"{self.name}, {asked.id}: the answer {answer!r} is none of {', '.join(asked.choices)}.")
        prompt = f"{asked.text}\n\nQuestion: {asked.question}\nAnswer:"
        return Chosen(asked.id, prompt, tuple(f" {choice}" for choice in asked.choices), asked.choices.index(answer),
                      {"chance": 1 / len(asked.choices)}, (0, len(asked.text)))


def _cut(text: str) -> tuple[str, str, str]:
    """`text` before, at and after the first empty line behind the last choice."""
    last = max(text.find("(D)"), 0)
    options, gap, rest = text[last:].partition("\n\n")
    return text[:last] + options, gap, rest


_QASPER: dict[str, Any] = dict(file="qasper", size="20 MB", licence="CC BY 4.0", empty="Unanswerable")

TASKS: tuple[Task, ...] = (
    Scrolls("narrativeqa", "narrative_qa", "8.05 GB", "Apache-2.0"),
    Scrolls("qasper", choose_yes_no=True, **_QASPER),
    Scrolls("qasper-written", **_QASPER),
    Quality("quality", "quality", "31 MB", "CC BY 4.0"),
)
