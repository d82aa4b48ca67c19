"""What clients get: bodies and pieces in the form of OpenAI's, from what the core delivers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from hinny.infer.request import Choice, Delivery
from hinny.infer.text import Text
from hinny.tokenizer import EOD_TEXT, Tokenizer

LEAST = -9999.0
"""For the log-probability of what is impossible: JSON has no infinity."""


class Usage:
    """Tokens of one answer, over all its prompts and continuations."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt = prompt_tokens
        self.completion = 0
        self._cached: dict[int, int] = {}

    def count(self, prompt: int, piece: Delivery) -> None:
        """A piece that continues the prompt of this number."""
        self.completion += len(piece.choices)
        self._cached[prompt] = max(piece.cached, self._cached.get(prompt, 0))

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were not read again."""
        return sum(self._cached.values())

    def body(self) -> dict[str, Any]:
        """OpenAI's figures."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion,
                "total_tokens": self.prompt + self.completion,
                "prompt_tokens_details": {"cached_tokens": self.cached}}


class Words:
    """Tokens as clients see them in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def name(self, token: int) -> str:
        """Its text; where it is no text by itself, token_id:NUMBER, so that two tokens never have one name."""
        if token == self.tokenizer.eod:
            return EOD_TEXT
        text = self.tokenizer.decode([token])
        return text if text and "\ufffd" not in text else f"token_id:{token}"

    def chat(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {"content": [{**self._entry(choice.token, choice.logprob),
                             "top_logprobs": [self._entry(*each) for each in choice.top]} for choice in choices],
                "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self.name(token)
        whole = not name.startswith("token_id:")
        return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode()) if whole else None}


class Continuation:
    """One choice of an answer, as its pieces come."""

    def __init__(self, index: int, words: Words, prompt: Sequence[int], echo: str = "") -> None:
        """echo: text that goes in front."""
        self.index, self.words = index, words
        self.text, self.ended = echo, ""
        self.choices: list[Choice] = []
        self._written = Text(words.tokenizer, prompt)
        self._echoed = len(echo)

    def take(self, piece: Delivery) -> None:
        """The next piece."""
        self.text += piece.text
        self.choices += piece.choices
        self.ended = piece.ended or ""

    def logprobs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """`logprobs` of a completion's choice, for its next tokens. Offsets count characters of the choice's text."""
        offsets = []
        for choice in choices:
            offsets.append(self._echoed + len(self._written.text.rstrip("\ufffd")))
            if choice.token != self.words.tokenizer.eod:
                self._written.append(choice.token)
        name = self.words.name
        return {"tokens": [name(c.token) for c in choices], "token_logprobs": [_finite(c.logprob) for c in choices],
                "top_logprobs": [{name(t): _finite(p) for t, p in (*c.top, (c.token, c.logprob))} if c.top else {}
                                 for c in choices], "text_offset": offsets}


class Form:
    """The envelope of one answer; `chat` decides between the two endpoints' forms."""

    def __init__(self, model: str, *, chat: bool, logprobs: bool, usage: bool) -> None:
        """usage: whether a stream ends with the figures, and each of its pieces says that they are still to come."""
        self.chat, self.with_logprobs, self.with_usage = chat, logprobs, usage
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.model, self.created = model, int(time.time())

    def whole(self, parts: Sequence[Continuation], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for part in parts:
            choice: dict[str, Any] = {"index": part.index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": part.text, "refusal": None}
            else:
                choice["text"] = part.text
            choices.append(choice | {"logprobs": self._logprobs(part, part.choices), "finish_reason": part.ended})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage.body()}

    def opening(self, part: Continuation) -> bytes | None:
        """What a streamed choice begins with: whose turn it is, or the prompt that was to be echoed."""
        if self.chat:
            return self._piece({"index": part.index, "delta": {"role": "assistant", "content": ""},
                                "logprobs": None, "finish_reason": None})
        if part.text:
            return self._piece({"index": part.index, "text": part.text, "logprobs": None, "finish_reason": None})
        return None

    def next(self, part: Continuation, piece: Delivery) -> bytes:
        """One event of a stream."""
        choice: dict[str, Any] = {"index": part.index}
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text or piece.ended is None else {}
        else:
            choice["text"] = piece.text
        return self._piece(choice | {"logprobs": self._logprobs(part, piece.choices), "finish_reason": piece.ended})

    def closing(self, usage: Usage) -> bytes:
        """The end of a stream."""
        last = b""
        if self.with_usage:
            last = event(self._envelope(self._piece_kind, []) | {"usage": usage.body()})
        return last + b"data: [DONE]\n\n"

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _piece(self, choice: dict[str, Any]) -> bytes:
        body = self._envelope(self._piece_kind, [choice])
        return event(body | {"usage": None} if self.with_usage else body)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, part: Continuation, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return part.words.chat(choices) if self.chat else part.logprobs(choices)


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
