"""What all RULER tasks share: how long a sample is, how it is made to fit, how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import ClassVar

from hinny.errors import ConfigError, DataError
from hinny.evals.ruler import scores
from hinny.evals.ruler.fitting import Plan, fit
from hinny.evals.task import Answer, Sample, Setting, Written
from hinny.infer.reading.requests import Generated

PAPER, HEAD = "2024-06", "head"
REVISIONS = {PAPER: 1, HEAD: 1}
"""Version of the benchmark → our revision of it; rises whenever a prompt, a sample or a score does change."""

Draw = Callable[[int], Plan]
"""Index of a sample → all of it but its size."""


def is_head(setting: Setting) -> bool:
    """Whether the current version is asked for; ConfigError for one that is not known."""
    if setting.ruler_version not in REVISIONS:
        raise ConfigError(f"ruler_version is {setting.ruler_version!r}; it must be one of {', '.join(REVISIONS)}.")
    return setting.ruler_version == HEAD


def length_of(setting: Setting) -> int:
    """`setting.length`, or ConfigError where there is none."""
    if setting.length is None:
        raise ConfigError("RULER is made at lengths: give one or more, for instance 4096.")
    return setting.length


@dataclass(frozen=True)
class RulerTask(ABC):
    """One of the thirteen: prompts of `Setting.length` tokens, the tokens to be written included."""

    name: str
    version: ClassVar[str] = ", ".join(f"{version}-{revision}" for version, revision in REVISIONS.items())
    """Of both versions of the benchmark; a sample's fact "ruler" names the one it is of."""
    shots: ClassVar[int] = 0
    metrics: ClassVar[tuple[str, ...]] = ("string_match_all",)
    sized: ClassVar[bool] = True
    answer_tokens: ClassVar[int]
    """Tokens that may be written."""

    @abstractmethod
    def draw(self, setting: Setting) -> Draw:
        """Prepares what all samples at `setting.length` share."""

    def number(self, setting: Setting) -> int:
        """How many samples there are."""
        return setting.samples

    def missing(self, setting: Setting) -> list[str]:
        """Files that it is made of and that are not there."""
        return []

    def least(self, setting: Setting) -> int:
        """A length at which all samples can be made, with as little haystack as can be.

        Not above `setting.length` if they can be made at that length; what is drawn, and so the least, depends on it.
        """
        self._check(setting)
        return _least(self, setting)

    def samples(self, setting: Setting) -> Iterable[Sample]:
        """The samples; ConfigError if `setting.length` is too short for one of them, DataError for missing files."""
        self._check(setting)
        if (length := length_of(setting)) < (least := self.least(setting)):
            raise ConfigError(f"{self.name} at {length} tokens, {setting.ruler_version}: the shortest samples with "
                              f"this tokenizer take {least} tokens; ask for {least} or more.")
        return self._written(setting, length)

    def settled(self, sample: Written, text: str) -> bool:
        """Whether every reference has been written."""
        return all(map(scores.lasts, sample.references)) and scores.string_match_all(text, sample.references) == 1

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """The share of the references that occur in the text, whatever their case."""
        assert isinstance(sample, Written)
        assert isinstance(answer, Generated)
        return {"string_match_all": scores.string_match_all(answer.text, sample.references)}

    def _check(self, setting: Setting) -> None:
        is_head(setting)
        if missing := self.missing(setting):
            raise DataError(f"{self.name} needs {'; '.join(missing)}")

    def _written(self, setting: Setting, length: int) -> Iterator[Sample]:
        draw = self.draw(setting)
        version = f"{setting.ruler_version}-{REVISIONS[setting.ruler_version]}"
        for index in range(self.number(setting)):
            plan = draw(index)
            fitted = fit(plan, setting.tokenizer, length - self.answer_tokens - _reserve(plan, setting))
            assert fitted is not None, (self.name, length, index)
            facts = {"ruler": version, "tokens": fitted.tokens, "units": fitted.units, **plan.facts(fitted.units)}
            yield Written(f"{self.name}/{length}/{index}", fitted.prompt, plan.references, self.answer_tokens,
                          facts=facts)

    def shortest(self, setting: Setting) -> int:
        """Tokens of the longest sample at `setting.length`, were each made as short as can be."""
        draw, encode, longest = self.draw(setting), setting.tokenizer.encode_many, 0
        plans = map(draw, range(self.number(setting)))
        while some := list(islice(plans, 64)):
            prompts = encode([plan.text(plan.low) for plan in some])
            longest = max(longest, *(len(ids) + _reserve(plan, setting)
                                     for ids, plan in zip(prompts, some, strict=True)))
        return longest + self.answer_tokens


def _reserve(plan: Plan, setting: Setting) -> int:
    return len(setting.tokenizer.encode(plan.reserve)) if plan.reserve else 0


@lru_cache(maxsize=256)
def _least(task: RulerTask, setting: Setting) -> int:
    length = asked = setting.length or 1
    while (found := task.shortest(replace(setting, length=length))) > length:
        length = found
    return min(length, _least(task, replace(setting, length=1))) if length == asked else length
