"""What clients send: OpenAI's fields, each of which acts or is refused, and a few of hinny's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hinny.infer.request import MOST_LOGPROBS
from hinny.infer.sampling import Sampling
from hinny.infer.server.refusals import Refusal

MOST_STOPS = 16
MOST_N = 128
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
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
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
                raise Refusal(400, f"{name} is not served; leave it out.", param=name, code="unsupported")
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
            raise Refusal(400, "best_of is not served; leave it out, or make it equal to n.", param="best_of",
                          code="unsupported")
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
    content: str | list[TextPart]
    name: str | None = None
    """For the client's own records; nothing depends on it."""

    @property
    def text(self) -> str:
        """The content, its pieces joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
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


Kind = TypeVar("Kind", bound=Asked)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The body as this kind of request. Refusal 400 with the field at fault, if there is one."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as mistake:
        faults = mistake.errors(include_url=False, include_input=False, include_context=False)
        raise _refusal([(tuple(map(str, fault["loc"])), fault["msg"]) for fault in faults]) from None
    asked.check()
    return asked


def _refusal(faults: list[tuple[tuple[str, ...], str]]) -> Refusal:
    """Of the first field that is wrong. A field of several types has a fault for each, and each is told once."""
    where = faults[0][0]
    if not where:
        return Refusal(400, f"the body cannot be read: {faults[0][1]}.", code="invalid_body")
    if faults[0][1] == "Extra inputs are not permitted":
        name = ".".join(where)
        return Refusal(400, f"{name[:100]} is not a field that is known here; leave it out.", param=name[:100],
                       code="unknown_field")
    told = dict.fromkeys(message for loc, message in faults if loc[0] == where[0])
    return Refusal(400, f"{where[0]}: {'; or '.join(list(told)[:4])}.", param=where[0])
