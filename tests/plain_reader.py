"""What a reader must answer: one full forward pass of the whole sequence for every request and every new token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hinny.infer.reading.requests import Generate, Generated, Score, Scored
from hinny.infer.reading.trie import Request
from hinny.model import Model
from hinny.tokenizer import Tokenizer

WORDS = 37


class Letters(Tokenizer):
    """a to z and ten digits are 1 to 36; 0 is eod."""

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"

    def __init__(self) -> None:
        super().__init__(b"letters", vocab_size=WORDS, eod=0)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.letters.index(c) + 1 for c in text] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i - 1] for i in ids)

    def _n_bytes(self, ids: list[int]) -> int:
        return len(ids)


@torch.no_grad()
def plainly(model: Model, requests: Sequence[Request]) -> list[Scored | Generated]:
    """The answers, each by itself."""
    return [_score(model, r) if isinstance(r, Score) else _generate(model, r) for r in requests]


def _score(model: Model, request: Score) -> Scored:
    tokens = torch.tensor([request.context + request.continuation], device=model.output_weight.device)
    logits = model(tokens)[0, len(request.context) - 1:-1].cpu()
    targets = torch.tensor(request.continuation)
    likeliest = logits[:, :WORDS].argmax(-1)
    chances = logits.double().log_softmax(-1)[torch.arange(len(targets)), targets]
    return Scored(chances.numpy(), likeliest.numpy(), bool((likeliest == targets).all()))


def _generate(model: Model, request: Generate) -> Generated:
    tokens: list[int] = []
    device = model.output_weight.device
    while True:
        token = int(model(torch.tensor([[*request.prompt, *tokens]], device=device))[0, -1, :WORDS].argmax())
        tokens.append(token)
        text = Letters().decode(tokens)
        hits = [text.index(stop) for stop in request.stop if stop in text]
        if token == 0 or hits or len(tokens) == request.max_tokens:
            return Generated(tuple(tokens), text[:min(hits)] if hits else text,
                             "eod" if token == 0 else "stop" if hits else "length")
