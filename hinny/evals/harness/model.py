"""lm-eval's model interface over a `Reader`: each method is one call of the Reader, so that requests share prefixes.

Needs the extra `eval`; import this module only where an evaluation runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hinny.errors import RequestError
from hinny.infer.reading.requests import Generate, Progress, Reader, Score

Truncate = Literal["error", "left", "middle"]
"""What is done with a request of more than `max_length` tokens: refuse it, or drop the first or the middle tokens of
its context. A cut is counted in `ReaderLM.truncated`."""

MAX_GEN_TOKS = 256
"""Tokens written where a task does not say how many: lm-eval's own default."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Spellings of the number of tokens to write; lm-eval's models know them all."""

AT_ONCE = 256
"""Requests that are encoded at once: a tokenizer needs a hundred bytes a token while it works."""


class ReaderLM(TemplateLM):
    """A `Reader` as lm-eval's models are asked. Greedy only; no chat template; no begin-of-sequence token.

    Text is tokenised as `TemplateLM` does: the whole is encoded and split at the length of the encoded context. A
    context is encoded, and held, once for all its continuations. One without tokens is the end-of-document token.

    max_length: tokens that go through the model at once; None: no bound. As in lm-eval, the last token of a
    continuation does not count, and for writing, prompt and `max_gen_toks` count.
    """

    def __init__(self, reader: Reader, max_length: int | None = None, truncate: Truncate = "error",
                 progress: Progress | None = None) -> None:
        super().__init__()
        if truncate not in ("error", "left", "middle"):
            raise RequestError(f"truncate is {truncate!r}; allowed: error, left, middle.")
        if max_length is not None and max_length < 2:
            raise RequestError(f"max_length is {max_length}; it must be 2 or more.")
        self.reader = reader
        self.max_length = max_length
        self.truncate = truncate
        self.progress = progress
        self._words = tuple(range(reader.tokenizer.vocab_size))
        self.requests = 0
        """Requests answered so far."""
        self.truncated = 0
        """Of these, those whose context was cut."""

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token; it also stands for an empty context."""
        return self.reader.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval would name a cache of requests by."""
        return self.reader.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the text; `add_special_tokens` changes nothing, there are none to add."""
        return self.reader.tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding writes it) of each continuation after its context."""
        texts = [request.args for request in requests]
        contexts: dict[str, tuple[int, ...]] = {}
        pairs = []
        # of the ids of whole texts only the continuation is kept
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start:start + AT_ONCE]
            moved = [_move_spaces(context, continuation) for context, continuation in some]
            contexts |= self._encode([context for context, _ in moved if context not in contexts])
            wholes = self._encode([context + continuation for context, continuation in moved])
            for given, (context, continuation) in zip(some, moved, strict=True):
                before, whole = contexts[context], wholes[context + continuation]
                pairs.append((given, before or (self.prefix_token_id,), whole[len(before):]))
        return self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], Sequence[int], Sequence[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        # all continuations of one context see the same cut of it, so that choices are compared, and shared, alike
        longest: dict[str, int] = {}
        for (prompt, text), _, continuation in requests:
            if not continuation:
                raise RequestError(f"the continuation {text!r} has no token of its own: the tokenizer joins it with "
                                   "the end of its context. Evaluate with another formulation of the task.")
            longest[prompt] = max(longest.get(prompt, 0), len(continuation))
        scores = []
        for (prompt, _), context, continuation in requests:
            room = None if self.max_length is None else self.max_length + 1 - longest[prompt]
            scores.append(Score(self._cut(tuple(context), room), tuple(continuation)))
        self.requests += len(scores)
        return [(scored.total, scored.greedy) for scored in self.reader.score(scores, self.progress)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text after an end-of-document token, in nats.

        Without `max_length` in one piece; with it in lm-eval's disjoint windows of that many tokens.
        """
        scores, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = map(make_disjoint_window, get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length or max(len(tokens), 1), 1))
            for context, continuation in windows:
                scores.append(Score(tuple(context), tuple(continuation)))
                owners.append(i)
        self.requests += len(requests)
        totals = [0.0] * len(requests)
        for i, scored in zip(owners, self.reader.score(scores, self.progress), strict=True):
            totals[i] += scored.total
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What greedy decoding writes after each context, up to the first of its stop strings."""
        ids = self._encode([request.args[0] for request in requests])
        generates = []
        for request in requests:
            context, options = request.args
            stop, max_tokens = _writing(options)
            room = None if self.max_length is None else self.max_length - max_tokens
            prompt = self._cut(ids[context] or (self.prefix_token_id,), room)
            generates.append(Generate(prompt, max_tokens, stop))
        self.requests += len(generates)
        return [generated.text for generated in self.reader.generate(generates, self.progress)]

    def _encode(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """text → its ids, each distinct text encoded, and its ids held, once."""
        distinct = list(dict.fromkeys(texts))
        found: dict[str, tuple[int, ...]] = {}
        for start in range(0, len(distinct), AT_ONCE):
            some = distinct[start:start + AT_ONCE]
            # one object for each word, not for each token: a quarter of the memory
            found |= {text: tuple(map(self._words.__getitem__, ids))
                      for text, ids in zip(some, self.reader.tokenizer.encode_many(some), strict=True)}
        return found

    def _cut(self, context: tuple[int, ...], room: int | None) -> tuple[int, ...]:
        """`context`, or `room` tokens of it by the policy; RequestError where that is not allowed or cannot be."""
        if room is None or len(context) <= room:
            return context
        if room < 1:
            raise RequestError(f"max_length is {self.max_length}, which leaves {room} tokens for a context beside what "
                               "is to be scored or written; raise it.")
        if self.truncate == "error":
            raise RequestError(f"a context of {len(context)} tokens where {room} have room (max_length is "
                               f"{self.max_length}); raise it, or choose a policy: truncate 'left' or 'middle'.")
        self.truncated += 1
        if self.truncate == "left":
            return context[-room:]
        head = room // 2
        return context[:head] + context[len(context) - (room - head):]


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Both texts, the spaces that end the context moved to the continuation, as `TemplateLM` splits them."""
    kept = context.rstrip()
    return kept, context[len(kept):] + continuation


def _writing(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and most tokens of lm-eval's generation arguments; RequestError for what asks for sampling."""
    rest = dict(options)
    until = rest.pop("until", None) or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    named = {name: rest.pop(name) for name in LENGTH_NAMES if rest.get(name) is not None}
    if len(named) > 1:
        raise RequestError(f"{' and '.join(named)} say the same thing twice; give one of them.")
    if rest.pop("do_sample", False) or rest.pop("temperature", 0):
        raise RequestError(f"generation with {dict(options)} draws at random; only greedy decoding is served: "
                           "do_sample false, temperature 0.")
    if idle := [name for name, value in rest.items() if value is not None]:
        raise RequestError(f"generation argument {idle[0]!r} is not known; allowed: until, do_sample, temperature, "
                           f"{', '.join(LENGTH_NAMES)}.")
    return stop, int(next(iter(named.values()), MAX_GEN_TOKS))
