"""A core's deliveries, sorted by request for those who ask for them one after another, and put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hinny.infer.core import Core
from hinny.infer.request import Choice, Delivery, Request


@dataclass(frozen=True)
class Answer:
    """One whole continuation."""

    text: str
    choices: tuple[Choice, ...]
    ended: str
    """As of a Delivery: "stop", "length" or "failed"."""
    message: str
    cached: int
    """Tokens of the prompt that were not read again."""


class Answers:
    """A core and what it delivered to those who have not asked for it yet: several may be asked for in turn."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._mail: dict[int, deque[Delivery]] = {}

    def add(self, requests: Sequence[Request]) -> list[int]:
        """All of them, or, with RequestError or what the tokenizer raises, none."""
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self.core.add(request))
                self._mail[numbers[-1]] = deque()
        except BaseException:
            self.leave(numbers)
            raise
        return numbers

    def of(self, number: int, n: int) -> Iterator[Delivery]:
        """A request's deliveries, to the end of the last of its n continuations."""
        mail = self._mail[number]
        while n:
            while not mail:
                for delivery in self.core.step():
                    if delivery.request in self._mail:
                        self._mail[delivery.request].append(delivery)
            n -= mail[0].ended is not None
            yield mail.popleft()

    def leave(self, numbers: Sequence[int]) -> None:
        """Nobody asks for these any longer."""
        for number in numbers:
            self.core.cancel(number)
            self._mail.pop(number, None)


def whole(request: Request, pieces: Sequence[Delivery]) -> list[Answer]:
    """Deliveries of a request → its continuations."""
    found = []
    for index in range(request.n):
        own = [piece for piece in pieces if piece.index == index]
        assert own[-1].ended is not None
        found.append(Answer("".join(piece.text for piece in own), tuple(c for piece in own for c in piece.choices),
                            own[-1].ended, own[-1].message, own[-1].cached))
    return found
