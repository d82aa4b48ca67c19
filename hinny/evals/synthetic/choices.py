"""Multiple choice over made-up lookups and sums, in the three ways that MMLU is asked.

Small items for the three paths of scoring; no measure of knowledge. The questions are made by hinny.data.choices, which
the training stream practises, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hinny.data import choices
from hinny.evals.task import Answer, Chosen, Sample, Setting, Written


@dataclass(frozen=True)
class Choice:
    """64 items and more, half of them lookups and half sums, after two solved ones that never change.

    `form` "letter": the choices are shown with letters, the letters are scored. "text": they are shown, their texts are
    scored. "cloze": they are not shown, their texts are scored. The three forms ask the same items.
    After the paper's three ways of asking MMLU (arXiv 2406.07887).
    Metrics: "acc", the likeliest choice is right; "acc_norm", the likeliest by log-probability per character, which is
    left out where all choices are letters. Chance is 0.25.
    """

    name: str
    form: str
    metrics: tuple[str, ...]
    version: str = "1"
    shots: int = 2
    sized: bool = False

    def missing(self, setting: Setting) -> list[str]:
        """Nothing."""
        return []

    def least(self, setting: Setting) -> int:
        """0: it has no lengths."""
        return 0

    def samples(self, setting: Setting) -> Iterator[Sample]:
        """`setting.samples` items."""
        # of one name, so that the forms ask the same
        shots = [choices.draw_item(setting.rng("choice/shots", i), i) for i in range(self.shots)]
        head = choices.head(self.form)
        head += "".join(f"{choices.asked(item, self.form)}{choices.answers(item, self.form)[item.right]}\n\n"
                        for item in shots)
        for index in range(setting.samples):
            item = choices.draw_item(setting.rng("choice", index), index)
            yield Chosen(f"{self.name}-{index}", head + choices.asked(item, self.form),
                         choices.answers(item, self.form), item.right, {"kind": item.kind, "chance": 0.25})

    def settled(self, sample: Written, text: str) -> bool:
        """Never asked: nothing is written."""
        return False

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """acc, and acc_norm unless the choices are letters."""
        assert isinstance(sample, Chosen), type(sample)
        assert isinstance(answer, list), type(answer)
        totals = np.array([scored.total for scored in answer])
        sizes = np.array([len(choice.strip()) for choice in sample.choices])
        found = {"acc": float(totals.argmax() == sample.right),
                 "acc_norm": float((totals / sizes).argmax() == sample.right)}
        return {metric: found[metric] for metric in self.metrics}


TASKS = (Choice("choice-letter", "letter", ("acc",)), Choice("choice-text", "text", ("acc", "acc_norm")),
         Choice("choice-cloze", "cloze", ("acc", "acc_norm")))
