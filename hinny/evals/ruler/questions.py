"""Questions on documents, one of which (SQuAD) or two (HotpotQA) hold the answer.

Prompts from NVIDIA/RULER (github.com/NVIDIA/RULER), Apache-2.0. Where they differ from the original's: documents are
put in an order drawn anew for each sample, where the original has the right one at the same place in all samples of
a number of documents; and there may be fewer than ten of them, where the original tries ten for ever.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hinny.errors import DataError
from hinny.evals.ruler import scores
from hinny.evals.ruler.base import Draw, RulerTask, is_head
from hinny.evals.ruler.fitting import Parts, Plan
from hinny.evals.task import Answer, Sample, Setting, Written
from hinny.infer.reading.requests import Generated

PROMPT = ("Answer the question based on the given documents. Only give me the answer and do not output any other "
          "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
          "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:")
LABEL = "Document {i}:\n"


@dataclass(frozen=True)
class Question:
    """A question; documents are told by their place in the collection."""

    text: str
    answers: tuple[str, ...]
    shown: tuple[int, ...]
    """Documents that are always there."""
    holds: tuple[int, ...]
    """Those of them that hold the answer."""
    related: tuple[int, ...] = ()
    """Documents that are shown before unrelated ones are."""


@dataclass(frozen=True, eq=False)
class Collection:
    """Different documents in alphabetical order, and the questions in the order of the file."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Questions(RulerTask):
    """Answers to the questions of `file`, below `Setting.data`, in its order."""

    metrics: ClassVar[tuple[str, ...]] = ("string_match_part",)
    answer_tokens: ClassVar[int] = 32
    file: ClassVar[str]
    source: ClassVar[str]
    """Where the file is fetched."""
    about: ClassVar[str]
    """Its size and licence."""

    @staticmethod
    @abstractmethod
    def collect(content: Any) -> Collection:
        """Documents and questions of a file's JSON."""

    def missing(self, setting: Setting) -> list[str]:
        """The file, if it is not there."""
        path = (setting.data or Path("ROOT")) / self.file
        if setting.data and path.is_file():
            return []
        where = f"{path} ({self.about})" if setting.data else f"{path} ({self.about}), with --data ROOT"
        return [f"{where}: curl --location --create-dirs --output {path} {self.source}"]

    def number(self, setting: Setting) -> int:
        """No more samples than questions."""
        return min(setting.samples, len(self._collection(setting).questions))

    def draw(self, setting: Setting) -> Draw:
        """A document is a unit."""
        head, collection, parts = is_head(setting), self._collection(setting), Parts(setting.tokenizer)

        def plan(index: int) -> Plan:
            question, rng = collection.questions[index], setting.rng(self.name, index)
            order, shown = int(rng.integers(2**63)), _Shown(question, collection, parts, rng)
            frame = int(parts.passing([PROMPT.format(context="", query=question.text)])[0])

            def laid(n: int) -> list[int]:
                chosen = shown.first(n)
                return [chosen[i] for i in np.random.default_rng(order).permutation(n)]

            def text(n: int) -> str:
                context = "\n\n".join(LABEL.format(i=i) + collection.documents[d] for i, d in enumerate(laid(n), 1))
                return PROMPT.format(context=context, query=question.text)

            def told(n: int) -> dict[str, Any]:
                documents = laid(n)
                return {"depths": [round(documents.index(d) / n, 4) for d in question.holds]}
            fewest = len(question.shown)
            return Plan(text=text, size=lambda n: frame + shown.size(n),
                        low=fewest if head else max(fewest, min(10, len(collection.documents))),
                        step=1 if head else 10,
                        most=lambda tokens: shown.most(tokens, again=head), references=question.answers, facts=told,
                        reserve="" if head else f" {list(question.answers)}")
        return plan

    def settled(self, sample: Written, text: str) -> bool:
        """Whether one of the references has been written."""
        return scores.string_match_part(text, [ref for ref in sample.references if scores.lasts(ref)]) == 1

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """1 if one of the references occurs in the text, whatever its case."""
        assert isinstance(sample, Written)
        assert isinstance(answer, Generated)
        return {"string_match_part": scores.string_match_part(answer.text, sample.references)}

    def _collection(self, setting: Setting) -> Collection:
        assert setting.data is not None
        path = setting.data / self.file
        return _read(type(self), path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(kind: type[Questions], path: Path, changed: int) -> Collection:
    try:
        collection = kind.collect(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise DataError(f"{path} is not the file of {kind.source}: {type(fault).__name__}: {fault}. "
                        "Fetch it again.") from None
    if not collection.questions:
        raise DataError(f"{path} has no question that can be answered. Fetch it again from {kind.source}.")
    for question in collection.questions:
        # the empty text stands in every answer, and no text is none
        if not question.answers or not all(map(str.strip, question.answers)):
            raise DataError(f"{path}: the question {question.text!r} has the answers {list(question.answers)}; each "
                            f"needs one or more, and none may be empty. Fetch it again from {kind.source}.")
    return collection


class _Shown:
    """Documents for one question in the order in which they are taken, more and more of them."""

    def __init__(self, question: Question, collection: Collection, parts: Parts, rng: np.random.Generator) -> None:
        self._collection, self._parts, self._rng = collection, parts, rng
        related = rng.permutation(np.array(question.related, dtype=np.int64)).tolist()
        self._taken = [*question.shown, *related]
        self._sums = [0]

    def first(self, n: int) -> list[int]:
        while len(self._taken) < n:
            every = self._rng.permutation(len(self._collection.documents)).tolist()
            # all documents once, then all of them again
            seen = set(self._taken) if len(self._taken) < len(every) else set()
            self._taken += [d for d in every if d not in seen]
        return self._taken[:n]

    def size(self, n: int) -> int:
        """About the tokens of the first `n`, with their labels."""
        if n >= len(self._sums):
            new = range(len(self._sums), max(n, len(self._sums) + 31) + 1)
            texts = [self._collection.documents[d] + "\n\n" for d in self.first(new[-1])[new[0] - 1:]]
            sizes = self._parts.many(texts) + self._parts.many([LABEL.format(i=i) for i in new])
            self._sums += (self._sums[-1] + np.cumsum(sizes)).tolist()
        return self._sums[n]

    def most(self, tokens: int, again: bool) -> int:
        """Documents in about `tokens`; no more than there are, unless they may be shown `again`."""
        limit, n = tokens if again else len(self._collection.documents), 0
        while n < limit and self.size(n) <= tokens:
            n = min(n + 32, limit)
        return n


def _places(documents: Iterable[str]) -> dict[str, int]:
    """Each different document's place in the collection."""
    return {document: i for i, document in enumerate(sorted(set(documents)))}


@dataclass(frozen=True)
class Squad(Questions):
    """SQuAD 2.0, development set: the questions that have an answer."""

    file: ClassVar[str] = "squad/dev-v2.0.json"
    source: ClassVar[str] = "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
    about: ClassVar[str] = "SQuAD 2.0, 4.4 MB, CC BY-SA 4.0"

    @staticmethod
    def collect(content: Any) -> Collection:
        """Paragraphs; related ones are of the same article."""
        places = _places(p["context"] for article in content["data"] for p in article["paragraphs"])
        questions = []
        for article in content["data"]:
            siblings = [places[p["context"]] for p in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                here = places[paragraph["context"]]
                related = tuple(dict.fromkeys(place for place in siblings if place != here))
                questions += [Question(qa["question"], tuple(dict.fromkeys(a["text"] for a in qa["answers"])),
                                       (here,), (here,), related)
                              for qa in paragraph["qas"] if not qa["is_impossible"]]
        return Collection(tuple(places), tuple(questions))


@dataclass(frozen=True)
class Hotpot(Questions):
    """HotpotQA, development set with distractors: ten paragraphs are there for each question."""

    file: ClassVar[str] = "hotpotqa/hotpot_dev_distractor_v1.json"
    # the address of the authors no longer answers; this copy is the one that the benchmark names
    source: ClassVar[str] = ("https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/"
                             "7e54db4656209750ff487f6fdf8e39a66dba136b/hotpot_dev_distractor_v1.json")
    about: ClassVar[str] = "HotpotQA, 46 MB, CC BY-SA 4.0"

    @staticmethod
    def collect(content: Any) -> Collection:
        """Titles with their sentences."""
        def document(title: str, sentences: list[str]) -> str:
            return f"{title}\n{''.join(sentences)}"

        places = _places(document(*entry) for item in content for entry in item["context"])
        questions = []
        for item in content:
            titles = {title for title, _ in item["supporting_facts"]}
            shown = {places[document(*entry)]: entry[0] in titles for entry in item["context"]}
            questions.append(Question(item["question"], (item["answer"],), tuple(shown),
                                      tuple(place for place, holds in shown.items() if holds)))
        return Collection(tuple(places), tuple(questions))


TASKS = (Squad("ruler-qa-squad"), Hotpot("ruler-qa-hotpot"))
"""The two of questions on documents."""
