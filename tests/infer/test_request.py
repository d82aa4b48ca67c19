"""What may be asked of an engine, and what it may use: every bad value is refused with its name and itself."""

from __future__ import annotations

import dataclasses

import pytest

from hinny.errors import ConfigError, RequestError
from hinny.infer.limits import Limits
from hinny.infer.request import MOST_LOGPROBS, Request


def request(**values: object) -> Request:
    return Request(**{"prompt": (1,), "max_tokens": 1} | values)


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("max_tokens", 0, "1 or more"), ("max_tokens", -5, "1 or more"), ("n", 0, "1 or more"), ("n", -1, "1 or more"),
    ("logprobs", -1, "0 to 20"), ("logprobs", 21, "0 to 20")])
def test_a_bad_value_of_a_request_is_refused_by_name(name: str, value: int, allowed: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {value}; it must be {allowed}"):
        request(**{name: value})


def test_an_empty_prompt_and_an_empty_stop_string_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty; give at least one token"):
        request(prompt=())
    with pytest.raises(RequestError, match="a stop string is empty"):
        request(stop=("end", ""))


def test_values_on_the_bounds_are_taken() -> None:
    assert request(logprobs=0).logprobs == 0
    assert request(logprobs=MOST_LOGPROBS, n=1, stop=(" ",)).logprobs == 20
    assert request().sampling.greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        request().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(("name", "least"), [("sequences", 1), ("context", 1), ("step_tokens", 1), ("page", 1),
                                             ("snapshots", 0), ("drafts", 0), ("memory", 0)])
def test_a_bad_limit_is_refused_by_name(name: str, least: int) -> None:
    for value in (least - 1, -7):
        with pytest.raises(ConfigError, match=f"^{name} is {value}; it must be {least} or more"):
            Limits(**{name: value})
    if name != "step_tokens":
        assert getattr(Limits(**{name: least}), name) == least


def test_a_step_has_room_for_every_sequence_and_its_drafts() -> None:
    with pytest.raises(ConfigError, match=r"step_tokens is 39; .* 40: each sequence"):
        Limits(sequences=8, drafts=4, step_tokens=39)
    assert Limits(sequences=8, drafts=4, step_tokens=40).step_tokens == 40
    assert Limits(sequences=1, step_tokens=1).step_tokens == 1
