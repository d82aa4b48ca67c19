"""What clients send: OpenAI's fields, each of which acts or is refused, and a few of hinny's own."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from hinny.infer.request import MOST_LOGPROBS
from hinny.infer.sampling import Sampling
from hinny.infer.server.refusals import Refusal

MOST_STOPS = 16
MOST_N = 128
MOST_PARTS = 4096
"""Messages of a conversation, and pieces of a message."""
MOST_FAULTS = 100
"""Of a body that are looked at: each costs a thousand bytes, and a body has room for a million."""
MOST_SHOWN = 60
"""Characters of a wrong value that its refusal repeats."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Never = Annotated[Any, Field(description="Not served: refused unless it asks for nothing.")]

NEUTRAL: dict[str, list[Any]] = {
    "suffix": [None, ""], "logit_bias": [None, {}], "tools": [None, []], "tool_choice": [None, "none"],
    "functions": [None, []], "function_call": [None, "none"], "response_format": [None, {"type": "text"}],
    "modalities": [None, ["text"]],
}
"""Fields that are not served → values with which they ask for nothing."""


class Strict(BaseModel):
    """Unknown fields, numbers in quotes, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage: one more piece at the end counts the tokens."""

    include_usage: bool = False


class Asked(Strict):
    """What both endpoints take."""

    model: str | None = None
    """The served model's name, or none."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    seed: Annotated[int, Field(ge=-2**63, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_N)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    """The end-of-document token ends nothing."""
    user: str | None = None
    """For the client's own records; nothing depends on it."""
    logit_bias: Never = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn. With temperature 0 the likeliest is taken: filters and a seed change nothing, and go.

        Filters that let everything through go as well. RequestError for what `Sampling` refuses.
        """
        heat = 1.0 if self.temperature is None else self.temperature
        drawn = heat > 0
        return Sampling(
            temperature=heat, top_k=self.top_k if drawn else None,
            top_p=self.top_p if drawn and self.top_p != 1 else None,
            min_p=self.min_p if drawn and self.min_p else None,
            presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0, seed=self.seed if drawn else None)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Refusal for fields that ask for what is not served, or that say nothing together."""
        for name, neutral in NEUTRAL.items():
            if name in self.model_fields_set and getattr(self, name) not in neutral:
                allowed = " or ".join(json.dumps(value) for value in neutral)
                raise Refusal(400, f"{name} is {_shown(getattr(self, name))}, which is not served; leave it out, or "
                              f"give {allowed}.", param=name, code="unsupported")
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options goes with stream = true.", param="stream_options")


class CompletionRequest(Asked):
    """Body of /v1/completions."""

    prompt: (Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_N)] | Ids
             | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_N)])
    """Text, token ids, or a list of either."""
    max_tokens: Count | None = None
    """16 without it."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=MOST_N)] | None = None
    suffix: Never = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refusal(400, f"best_of is {self.best_of} and n {self.n or 1}, which is not served; leave best_of "
                          "out, or make it equal to n.", param="best_of", code="unsupported")
        if self.echo and self.logprobs is not None:
            raise Refusal(400, "echo with logprobs is not served: the prompt's own log-probabilities are not kept; "
                          "drop one of them.", param="echo", code="unsupported")


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_PARTS)]
    name: str | None = None
    """For the client's own records; nothing depends on it."""

    @property
    def text(self) -> str:
        """The content, its pieces joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_PARTS)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """What the context has room for without either."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Never = None
    tool_choice: Never = None
    functions: Never = None
    function_call: Never = None
    response_format: Never = None
    modalities: Never = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs goes with logprobs = true.", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise Refusal(400, f"max_tokens is {self.max_tokens} and max_completion_tokens "
                          f"{self.max_completion_tokens}; they mean the same, give one.", param="max_tokens")


FIELDS = {name for kind in (CompletionRequest, ChatRequest, Message, TextPart, StreamOptions)
          for name in kind.model_fields}
"""All names that a body may have."""
Kind = TypeVar("Kind", bound=Asked)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The body as this kind of request. Refusal 400 with the field at fault, if there is one."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as mistake:
        if (count := mistake.error_count()) > MOST_FAULTS:
            raise Refusal(400, f"the body has {count} mistakes; most are fields that are not known here.",
                          code="invalid_body") from None
        raise _refusal(mistake.errors(include_url=False, include_context=False)) from None
    asked.check()
    return asked


def _refusal(faults: list[ErrorDetails]) -> Refusal:
    """Of the first field that is wrong. A field of several types has a fault for each, and each is told once."""
    first = faults[0]
    if not first["loc"]:
        return Refusal(400, f"the body cannot be read: {first['msg']}.", code="invalid_body")
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))[:100]
        return Refusal(400, f"{name} is not a field that is known here; leave it out.", param=name,
                       code="unknown_field")
    top = str(first["loc"][0])
    # a place within a field of several types has their names in it
    path = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in FIELDS)
    if first["type"] == "missing":
        return Refusal(400, f"{path} is missing; it is needed.", param=top)
    told = dict.fromkeys(fault["msg"].replace("Input should", "it should").replace("List should", "a list should")
                         for fault in faults if fault["loc"][0] == top)
    return Refusal(400, f"{path} is {_shown(first['input'])}: {'; or '.join(list(told)[:4])}.", param=top)


def _shown(value: Any) -> str:
    """What somebody sent, in a few characters."""
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return kind if value else f"{kind} of nothing"
    # Python refuses to write numbers of thousands of digits
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = json.dumps(value[:MOST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."
