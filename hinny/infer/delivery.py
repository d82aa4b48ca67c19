"""From chosen tokens to pieces of text that may be shown, and to the end of a continuation."""

from __future__ import annotations

import logging

from hinny.infer.request import Choice, Delivery, Request
from hinny.infer.text import MARK, Text, certain
from hinny.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Writing:
    """One continuation while it is written. `take` and `finish` change it; an ended one takes no more.

    The first stop string to be complete ends the text; of several that the same token completes, the one that begins
    first. A stop string is looked for in finished characters, until the end.
    """

    def __init__(self, number: int, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self.number, self.request, self.index = number, request, index
        self.eod = tokenizer.eod
        self.ended: str | None = None
        self.cached = 0
        """Tokens of the prompt that were not read again; told with every delivery."""
        self.taken = 0
        """Tokens so far."""
        self._text = Text(tokenizer, request.prompt)
        self._told = 0

    def take(self, choice: Choice) -> Delivery:
        """One more token → what it made certain, often nothing; with `ended` set this was the last one: "failed" if
        the tokenizer cannot write it."""
        assert self.ended is None, (self.number, self.index, self.ended)
        self.taken += 1
        over = choice.token == self.eod
        if not over:
            self._text.append(choice.token)
        ended = "stop" if over and not self.request.ignore_eod else None
        if ended is None and self.taken == self.request.max_tokens:
            ended = "length"
        try:
            return self._deliver((choice,), ended)
        except (KeyboardInterrupt, SystemExit):
            raise
        # a panic of the `tokenizers` library is no Exception
        except BaseException as fault:
            logger.error("the tokenizer cannot write token %d", choice.token, exc_info=fault)
            self.ended = "failed"
            why = f"the tokenizer cannot write token {choice.token} ({type(fault).__name__}: {fault})."
            return Delivery(self.number, self.index, "", (choice,), self.ended, why, self.cached)

    def finish(self, ended: str, message: str = "") -> Delivery:
        """The last piece of one that ends before its time, "cancelled" or "failed": what was held back."""
        assert self.ended is None, (self.number, self.index, self.ended)
        assert ended in ("cancelled", "failed"), ended
        return self._deliver((), ended, message)

    def _deliver(self, choices: tuple[Choice, ...], ended: str | None, message: str = "") -> Delivery:
        text = self._text.behind(self._told)
        finished = ended or not text.endswith(MARK)
        known = piece = text if finished else certain(text, (), self._text.fixed - self._told)
        if self.request.stop:
            if hits := [at for word in self.request.stop if (at := known.find(word)) >= 0]:
                piece = text[:min(hits)]
                ended = ended if ended in ("cancelled", "failed") else "stop"
            elif not ended:
                piece = certain(known, self.request.stop, len(known))
        self._told += len(piece)
        self.ended = ended
        return Delivery(self.number, self.index, piece, choices, ended, message, self.cached)
