"""A model that answers many requests at once, reading what they share only once.

How it goes about a call, from the outside in:

1. The tokens that must be read form a trie (`trie`). Scores and prompts hang in the same one, so a question
   that is asked for a text and for the likelihood of another text is read once.
2. The trie is walked depth first (`walk`). Of the nodes behind one state, some are kept: something lies
   behind them, and so their states are needed. As many of these as memory allows are read together; then what lies
   behind them; then the next ones. Half of the free memory is left to what lies deeper, so the walk never needs more
   than the budget, but for a single path that does.
3. No padding ever enters a state that is used again. Nodes of 512 tokens or more are read each by itself. Shorter
   ones are read together in pieces of equal lengths, 256, 128, … 1 tokens, each piece by all that have that binary
   digit in their length (`batch`). Where nothing is kept, at the ends of the trie, a batch is padded on its
   right: no position looks there.
4. A text longer than `piece` is read in pieces of that many tokens, and a batch has `tokens` tokens or one sequence.
5. The head is applied only at places whose next token matters, a slice of them at a time (`answers`).
6. Prompts that have been read wait until they fill a third of the memory, and are then continued together, whatever
   their lengths (`writing`). Those that end leave; when half are gone and prompts are still to be read,
   the others wait again and new ones join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from hinny.errors import ConfigError, RequestError
from hinny.infer.reading.answers import count
from hinny.infer.reading.batch import Limits
from hinny.infer.reading.requests import Generate, Generated, Progress, Score, Scored, Usage
from hinny.infer.reading.sizes import free_bytes
from hinny.infer.reading.trie import Request
from hinny.infer.reading.walk import Walk
from hinny.model import Model
from hinny.tokenizer import Tokenizer

SHARE = 0.6
"""Of the free memory, for states; the rest is for what a forward pass needs."""

TOKENS = {"cuda": 65536, "cpu": 16384}
"""Of one forward pass of several sequences: a GPU waits for Python in a small model's shorter passes."""


class ModelReader:
    """A `hinny.infer.reading.requests.Reader`: a model without gradients, on the device on which it is."""

    def __init__(self, model: Model, tokenizer: Tokenizer, *, budget: int | None = None, tokens: int | None = None,
                 piece: int = 8192) -> None:
        """budget: bytes for states, None for 60 % of what is free when a call begins; tokens: of one forward pass,
        None for `TOKENS`; piece: of one sequence in one forward pass. None of them changes an answer. ConfigError for
        one below 1.
        """
        for name, value in (("budget", budget), ("tokens", tokens), ("piece", piece)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more.")
        self.model, self.tokenizer, self.usage = model, tokenizer, Usage()
        on = TOKENS.get(model.output_weight.device.type, TOKENS["cpu"])
        self.budget, self.tokens, self.piece = budget, on if tokens is None else tokens, piece

    def score(self, requests: Sequence[Score], progress: Progress | None = None) -> list[Scored]:
        """The answer to each request, in their order. RequestError for a token that is no word."""
        return cast(list[Scored], self.answer(requests, progress))

    def generate(self, requests: Sequence[Generate], progress: Progress | None = None) -> list[Generated]:
        """The answer to each request, in their order. RequestError for a token that is no word."""
        return cast(list[Generated], self.answer(requests, progress))

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Scored | Generated]:
        """Answers to requests of both kinds, in their order; what a score and a text share is read once."""
        self._check(requests)
        self.usage.asked += count(requests)
        budget = self.budget or int(SHARE * free_bytes(self.model.output_weight.device))
        limits = Limits(budget=budget, tokens=self.tokens, piece=self.piece,
                        attention="*" in self.model.config.pattern)
        return Walk(self.model, self.tokenizer, requests, limits, self.usage, progress).run()

    def _check(self, requests: Sequence[Request]) -> None:
        """RequestError, before anything is read, for a token that the tokenizer or the model does not have."""
        words = min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        for i, request in enumerate(requests):
            parts = (request.prompt,) if isinstance(request, Generate) else (request.context, request.continuation)
            for part in parts:
                if min(part) < 0 or max(part) >= words:
                    wrong = next(t for t in part if not 0 <= t < words)
                    raise RequestError(f"request {i}: token {wrong} is no word; tokenizer "
                                       f"({self.tokenizer.vocab_size}) and model ({self.model.config.vocab_size}) have "
                                       f"the words 0 to {words - 1}. Encode the text with the tokenizer of this run.")
