"""Phone books: names and numbers fill the context, then one number is asked for.

`phonebook-standard` and `phonebook-reversed` are the paper's (section 3.3.3): the reversed form tells before the book
whose number will be asked. `phonebook-jelassi` is that of "Repeat After Me" (arXiv 2402.01032): ten digits in a row, no
words. Where the public code of these tasks goes wrong, this differs:

- The prompt ends in "Answer:" without the space that belongs to the answer's first token.
- The reversed prompt there ends with the question mark, and a base model goes on with a new line, which scores 0; here
  "Answer:" follows in both forms. `found` takes the first number of the answer wherever it stands.
- Names do not repeat in a book.
- Prompt and answer together have the length asked for; nothing is padded.

Ten questions share each book, and both forms of the paper have the same people: the number of a sample gives its book.
`digits` is the paper's fuzzy memory: the share of the ten digits that are right at their places; guessing gives 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hinny.errors import ConfigError
from hinny.evals import phonebook_books as books
from hinny.evals.task import Answer, Sample, Setting, Task, Written
from hinny.infer.reading.requests import Generated

HYPHENS = re.compile(r"\d{3}-\d{3}-\d{4}")
PLAIN = re.compile(r"\d{10}")


@dataclass(frozen=True)
class Phonebook:
    """One form of the phone book, at any length that holds three people."""

    name: str
    form: books.Form
    metrics: tuple[str, ...] = ("exact", "found", "digits")
    version: str = "1"
    shots: int = books.SHOWN
    sized: bool = True

    def missing(self, setting: Setting) -> list[str]:
        """Nothing: it is made."""
        return []

    def least(self, setting: Setting) -> int:
        """Tokens of the longest book of three people, with its answer."""
        return books.least(setting.tokenizer, self.form)

    def samples(self, setting: Setting) -> Iterator[Sample]:
        """Questions, those to one book together; their depths are spread evenly over any number of samples."""
        if setting.length is None:
            raise ConfigError(f"{self.name} is made at a length; give one (tokens of prompt and answer).")
        each = books.queries(setting.tokenizer, self.form, setting.length)
        for first in range(0, setting.samples, each):
            number = first // each
            book = books.make(setting.rng("phonebook", number), setting.tokenizer, self.form, setting.length, first)
            for i, query in enumerate(book.queries[:setting.samples - first], first):
                yield Written(str(i), query.prompt, (query.phone,), books.ANSWER_TOKENS, facts={
                    "book": number, "entries": book.entries, "depth": query.depth, "tokens": query.tokens})

    def settled(self, sample: Written, text: str) -> bool:
        """Once a number stands, and the first line is either complete or no beginning of the right number."""
        if not self._pattern.search(text):
            return False
        return "\n" in text or not sample.references[0].startswith(text.strip())

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Whether the first line is the number, whether the first number is; the share of right digits. 0 to 1 each."""
        assert isinstance(sample, Written), sample
        assert isinstance(answer, Generated), answer
        wanted, line = sample.references[0], answer.text.split("\n", 1)[0].strip()
        number = self._pattern.search(answer.text)
        said = re.sub(r"\D", "", number.group() if number else line)
        digits = re.sub(r"\D", "", wanted)
        right = sum(a == b for a, b in zip(said, digits, strict=False))
        return {"exact": float(line == wanted), "found": float(number is not None and number.group() == wanted),
                "digits": right / len(digits)}

    @property
    def _pattern(self) -> re.Pattern[str]:
        return HYPHENS if self.form.hyphens else PLAIN


TASKS: tuple[Task, ...] = (
    Phonebook("phonebook-standard", books.Form("standard")),
    Phonebook("phonebook-reversed", books.Form("reversed")),
    Phonebook("phonebook-jelassi", books.Form("jelassi", hyphens=False)),
)
