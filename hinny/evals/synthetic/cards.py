"""Question answering over made-up cards: a stand-in for RULER's questions on paragraphs, which need data sets.

The prompt has the wording of RULER's template "qa" (NVIDIA/RULER, Apache-2.0); the documents and questions are hinny's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hinny.data.names import FIRST, LAST
from hinny.errors import ConfigError
from hinny.evals.task import Answer, Sample, Setting, Written
from hinny.infer.reading.requests import Generated
from hinny.tokenizer import Tokenizer

TEMPLATE = ("Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
            "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query} Answer:")
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Accra", "Quito", "Hanoi", "Dublin", "Vienna", "Nairobi",
          "Prague", "Havana", "Athens", "Warsaw", "Bogota", "Riga", "Tunis", "Seoul", "Naples", "Lagos", "Delhi",
          "Sofia", "Basel")
TRADES = ("baker", "nurse", "painter", "sailor", "teacher", "tailor", "farmer", "lawyer", "plumber", "dentist",
          "printer", "jeweller", "carpenter", "gardener", "chemist", "translator")
INSTRUMENTS = ("violin", "cello", "flute", "harp", "piano", "trumpet", "drums", "guitar", "oboe", "organ", "banjo",
               "clarinet")
ANIMALS = ("parrot", "goat", "rabbit", "horse", "turtle", "donkey", "falcon", "hamster", "lizard", "spaniel")
FACTS = (("was born in {}.", "In which city was {} born?", CITIES),
         ("works as a {}.", "What is the profession of {}?", TRADES),
         ("plays the {}.", "Which instrument does {} play?", INSTRUMENTS),
         ("keeps a {} at home.", "Which animal does {} keep at home?", ANIMALS))
"""What a card says, the question about it, and the answers there are."""

PEOPLE = [f"{first} {last}" for first in FIRST.split() for last in LAST.split()]
LEAST_CARDS = 4


@dataclass(frozen=True)
class FactCards:
    """One card in a pile answers the question; each is about another person (shape of RULER's qa, arXiv 2404.06654).

    A pile is asked 4 questions about 4 of its people; as many cards as fit in the length with any of these questions.
    Metric: "match", whether the answer stands in what was written, ignoring case, as in RULER. A model that says a
    random answer of the right kind gets `chance`.
    """

    name: str = "fact-cards"
    version: str = "1"
    shots: int = 0
    metrics: tuple[str, ...] = ("match",)
    sized: bool = True
    queries: int = LEAST_CARDS
    max_tokens: int = 32

    def missing(self, setting: Setting) -> list[str]:
        """Nothing."""
        return []

    def least(self, setting: Setting) -> int:
        """Tokens of the template, of 4 cards of the longest words, of the longest question and of the answer."""
        count = _counter(setting.tokenizer)
        person = f"{max(FIRST.split(), key=count)} {max(LAST.split(), key=count)}"
        longest = [max(words, key=count) for _, _, words in FACTS]
        question = max((question.format(person) for _, question, _ in FACTS), key=count)
        cards = [_card(number, person, longest) for number in range(1, LEAST_CARDS + 1)]
        # words that are long alone may be short together; one token a card makes up for it
        return count(_prompt(cards, question)) + LEAST_CARDS + self.max_tokens

    def samples(self, setting: Setting) -> Iterator[Sample]:
        """`setting.samples` questions. ConfigError without a length, or below `least`."""
        least = self.least(setting)
        if setting.length is None or setting.length < least:
            raise ConfigError(f"{self.name}: length is {setting.length}; give a number of tokens, {least} or more for "
                              "this tokenizer.")
        for first in range(0, setting.samples, self.queries):
            pile = self._pile(setting, setting.length, first // self.queries)
            yield from pile[:setting.samples - first]

    def settled(self, sample: Written, text: str) -> bool:
        """Once the answer stands there."""
        return _holds(text, sample.references)

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """match."""
        assert isinstance(sample, Written), type(sample)
        assert isinstance(answer, Generated), type(answer)
        return {"match": float(_holds(answer.text, sample.references))}

    def _pile(self, setting: Setting, length: int, context: int) -> list[Written]:
        """The questions about one pile of cards."""
        rng, count = setting.rng(f"{self.name}/context", context), _counter(setting.tokenizer)
        # the first `queries` people are asked for; the others make the pile as high as it may be
        people = rng.permutation(len(PEOPLE)).tolist()
        told = np.stack([rng.integers(0, len(words), len(PEOPLE)) for _, _, words in FACTS], axis=1).tolist()
        asked = rng.integers(0, len(FACTS), self.queries).tolist()
        questions = [FACTS[fact][1].format(PEOPLE[people[i]]) for i, fact in enumerate(asked)]
        longest = max(questions, key=lambda question: count(f"Question: {question} Answer:"))
        order_seed = int(rng.integers(2**32))

        def cards(n: int) -> tuple[list[str], list[int]]:
            order = np.random.default_rng(order_seed).permutation(n).tolist()
            return [_card(number, PEOPLE[people[i]], [words[told[i][f]] for f, (_, _, words) in enumerate(FACTS)])
                    for number, i in enumerate(order, 1)], order

        n = _most(lambda n: count(_prompt(cards(n)[0], longest)), length - self.max_tokens, len(PEOPLE))
        if n < self.queries:
            raise ConfigError(f"{self.name}: {length} tokens hold {n} cards; {self.queries} are needed. Ask for more.")
        pile, order = cards(n)
        start = TEMPLATE.index("{context}")
        samples = []
        for i, (fact, question) in enumerate(zip(asked, questions, strict=True)):
            prompt, words = _prompt(pile, question), FACTS[fact][2]
            facts = {"context": context, "cards": n, "depth": order.index(i) / n, "chance": 1 / len(words)}
            samples.append(Written(f"{self.name}-{context * self.queries + i}", prompt, (words[told[i][fact]],),
                                   self.max_tokens, facts=facts, document=(start, start + len("\n\n".join(pile)))))
        return samples


def _card(number: int, person: str, words: list[str]) -> str:
    told = " ".join(f"{person if i == 0 else 'This person'} {fact.format(word)}"
                    for i, ((fact, _, _), word) in enumerate(zip(FACTS, words, strict=True)))
    return f"Document {number}:\n{told}"


def _prompt(cards: list[str], question: str) -> str:
    return TEMPLATE.format(context="\n\n".join(cards), query=question)


def _holds(text: str, references: tuple[str, ...]) -> bool:
    return any(reference.lower() in text.lower() for reference in references)


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text))


def _most(tokens: Callable[[int], int], room: int, limit: int) -> int:
    """The most cards, up to `limit`, whose prompt has at most `room` tokens.

    Cards are about equally long, so a few guesses do; each encodes the whole prompt.
    """
    low, high = 0, limit + 1
    base = at_low = tokens(0)
    a_card = max((tokens(1) - base), 1.0)
    while high - low > 1:
        guess = min(max(low + int((room - at_low) / a_card), low + 1), high - 1)
        size = tokens(guess)
        a_card = max((size - base) / guess, 1.0)
        if size <= room:
            low, at_low = guess, size
        else:
            high = guess
    return low


TASKS = (FactCards(),)
