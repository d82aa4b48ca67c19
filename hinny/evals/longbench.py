"""Tasks of LongBench (Bai et al. 2023, arXiv 2308.14508): six that the paper uses, two stand-ins for larger data sets.

Prompts, answer lengths and scores are those of THUDM/LongBench (MIT). Its data are read in either form: the original
(`data.zip`, extracted or not), or the tables of Xnhyacinth/LongBench, whose rows hold the prompt in three pieces.

Where lm-eval differs, this follows the original:
- triviaqa has an empty line before its question; lm-eval's prompt has none.
- trec and triviaqa score the first line after leading newlines; lm-eval stops at the first newline, so that an answer
  that begins with one counts as empty.
- A prompt that is too long loses the middle of its document; lm-eval cuts the prompt's beginning off, instructions
  included. The cut itself is the runner's, which is told the document's place.
- The tables hold instructions and "Answer:" already; lm-eval puts them into its template once more.
The question-answering tasks score all that was written, as the original does, and beside it the first line alone: a
model that was not tuned to stop goes on, which costs precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hinny.errors import ConfigError, DataError
from hinny.evals import long_files, metrics
from hinny.evals.task import Answer, Sample, Setting, Task, Written
from hinny.infer.reading.requests import Generated

ORIGINALS = ("THUDM/LongBench", "zai-org/LongBench")
"""Ids of the original on the Hub, the older first; one repository."""
TABLES = "Xnhyacinth/LongBench"


@dataclass(frozen=True)
class LongBench:
    """One task; a prompt is `head`, the document, `between`, the question and `tail`."""

    name: str
    file: str
    """Name of the task in LongBench's files."""
    head: str
    between: str
    tail: str
    max_tokens: int
    licence: str
    """Of the data set that LongBench took the task from."""
    metrics: tuple[str, ...] = ("f1", "f1_first_line")
    one_line: bool = False
    """Whether the first line alone is scored."""
    version: str = "1"
    shots: int = 0
    sized: bool = False

    def missing(self, setting: Setting) -> list[str]:
        """The data, if they are not there, with the command that fetches them."""
        if setting.data is not None and self._source(setting.data):
            return []
        root = setting.data if setting.data is not None else "ROOT"
        folder = f"{root}/{ORIGINALS[0]}"
        given = "" if setting.data is not None else "no folder of data sets is given (--data ROOT); "
        return [f"{self.name}: {given}{folder}/data.zip (114 MB, all tasks of LongBench; MIT, the task itself: "
                f"{self.licence}): hf download --repo-type dataset {ORIGINALS[0]} data.zip --local-dir {folder}"]

    def least(self, setting: Setting) -> int:
        """0: its samples have the length that they have."""
        return 0

    def samples(self, setting: Setting) -> Iterator[Sample]:
        """The first rows of the file. ConfigError if it is not there."""
        source = self._source(setting.data) if setting.data is not None else None
        if source is None:
            raise ConfigError(f"data is missing: {self.missing(setting)[0]}")
        for i, record in enumerate(islice(source.records(), setting.samples)):
            yield self._sample(record, f"{source.paths[0]}, row {i + 1}", str(i))

    def settled(self, sample: Written, text: str) -> bool:
        """For tasks of one line, once the line is complete; else every further word counts."""
        return self.one_line and metrics.first_line_stands(text)

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """F1, or the classification score, from 0 to 1."""
        assert isinstance(sample, Written), sample
        assert isinstance(answer, Generated), answer
        line = metrics.first_line(answer.text)
        if self.metrics == ("classification",):
            return {"classification": metrics.classification(line, sample.references, sample.facts["classes"])}
        if self.one_line:
            return {"f1": metrics.f1(line, sample.references)}
        return {"f1": metrics.f1(answer.text, sample.references), "f1_first_line": metrics.f1(line, sample.references)}

    def _source(self, root: Path) -> long_files.Source | None:
        for original in ORIGINALS:
            folder, file = root / original, f"data/{self.file}.jsonl"
            if found := long_files.find(folder / file, folder / "data.zip", file):
                return found
        return long_files.find_parquet(root / TABLES / self.file)

    def _sample(self, record: dict[str, Any], where: str, number: str) -> Written:
        document = long_files.field(record, "context", str, where)
        if "input" in record:
            question = self.between + long_files.field(record, "input", str, where) + self.tail
            prompt, start = self.head + document + question, len(self.head)
            end = start + len(document)
        else:
            prompt, start, end = self._pieces(record, where)
        references = tuple(long_files.field(record, "answers", list, where))
        if not references:
            raise DataError(f"{where}: field 'answers' is empty, so no answer can be right; fetch the file again.")
        facts: dict[str, Any] = {"words": record.get("length")}
        if self.metrics == ("classification",):
            facts["classes"] = tuple(long_files.field(record, "all_classes", list, where))
        return Written(id=str(record.get("_id", number)), prompt=prompt, references=references,
                       max_tokens=self.max_tokens, facts=facts, document=(start, end))

    def _pieces(self, record: dict[str, Any], where: str) -> tuple[str, int, int]:
        """Prompt and place of the document of a row that holds context with instructions, question, answer prefix."""
        context, question, prefix = (long_files.field(record, name, str, where)
                                     for name in ("context", "question", "answer_prefix"))
        between = self.between.removesuffix("Question: ")
        if not (context.startswith(self.head) and context.endswith(between)):
            raise DataError(f"{where}: the context does not begin and end with {self.name}'s instructions, as in "
                            f"{TABLES}; fetch {ORIGINALS[0]} instead.")
        prompt = context + question + ("" if question.endswith(prefix) else prefix)
        return prompt, len(self.head), len(context) - len(between)


_ONLY = "only give me the answer and do not output any other words."
_PASSAGES = ("Answer the question based on the given passages. Only give me the answer and do not output any other "
             "words.")
_SHORT = " as you can, using a single phrase if possible. Do not provide any explanation."
_PAPER = (" the question as concisely as you can, using a single phrase or sentence if possible. If the question "
          "cannot be answered based on the information in the article, write \"unanswerable\". If the question is a "
          "yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.")


def _passages(name: str, licence: str) -> LongBench:
    """A task of several documents."""
    return LongBench(name, name, f"{_PASSAGES}\n\nThe following are given passages.\n",
                     f"\n\n{_PASSAGES}\n\nQuestion: ", "\nAnswer:", 32, licence)


TASKS: tuple[Task, ...] = (
    LongBench("multifieldqa-en", "multifieldqa_en", "Read the following text and answer briefly.\n\n",
              f"\n\nNow, answer the following question based on the above text, {_ONLY}\n\nQuestion: ", "\nAnswer:", 64,
              "MIT"),
    _passages("hotpotqa", "CC BY-SA 4.0"),
    _passages("2wikimqa", "Apache-2.0"),
    _passages("musique", "CC BY 4.0"),
    LongBench("trec", "trec", "Please determine the type of the question below. Here are some examples of questions."
              "\n\n", "\n", "", 64, "none stated", ("classification",), one_line=True),
    LongBench("triviaqa", "triviaqa", "Answer the question based on the given passage. Only give me the answer and do "
              "not output any other words. The following are some examples.\n\n", "\n\n", "", 32, "Apache-2.0",
              ("f1",), one_line=True),
    # "asconcisely" is the original's spelling
    LongBench("narrativeqa-longbench", "narrativeqa", "You are given a story, which can be either a novel or a movie "
              f"script, and a question. Answer the question asconcisely{_SHORT}\n\nStory: ",
              f"\n\nNow, answer the question based on the story asconcisely{_SHORT}\n\nQuestion: ", "\n\nAnswer:", 128,
              "Apache-2.0"),
    LongBench("qasper-longbench", "qasper", f"You are given a scientific article and a question. Answer{_PAPER}"
              "\n\nArticle: ", "\n\n Answer" + _PAPER.replace("the question as", "the question based on the above "
              "article as", 1) + "\n\nQuestion: ", "\n\nAnswer:", 128, "CC BY 4.0"),
)
