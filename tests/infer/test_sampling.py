"""How a token is to be drawn: what may be asked together, and that a refusal names the option and its value."""

from __future__ import annotations

import pytest

from hinny.errors import RequestError
from hinny.infer.sampling import Sampling

NAN = float("nan")


@pytest.mark.parametrize(("name", "values"), [
    ("temperature", [-0.1, 100.5, NAN, float("inf")]), ("top_k", [0, -1]), ("top_p", [0, -0.1, 1.1, NAN]),
    ("min_p", [-0.1, 1.1, NAN]), ("presence_penalty", [-2.1, 2.1, NAN]), ("frequency_penalty", [-2.1, 2.1, NAN]),
    ("repetition_penalty", [0, -1.0, 101.0, NAN])])
def test_a_value_out_of_bounds_is_refused_with_name_and_value(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=rf"{name} is {value};") as fault:
            Sampling(**{"temperature": 1.0} | {name: value})
        assert "must be" in str(fault.value)


@pytest.mark.parametrize("option", [dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1), dict(seed=1)])
def test_an_option_that_greedy_cannot_use_is_refused(option: dict) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(option))} has no effect with temperature 0"):
        Sampling(**option)
    Sampling(temperature=0.1, **option)


@pytest.mark.parametrize("values", [dict(temperature=100), dict(top_p=1), dict(min_p=0), dict(min_p=1), dict(top_k=1),
                                    dict(presence_penalty=-2), dict(frequency_penalty=2), dict(seed=-2 ** 80),
                                    dict(repetition_penalty=0.001)])
def test_values_on_the_bounds_are_taken(values: dict) -> None:
    assert not Sampling(**{"temperature": 1.0} | values).greedy


def test_greedy_is_without_temperature_and_penalties() -> None:
    assert Sampling().greedy
    for options in (dict(temperature=0.1), dict(presence_penalty=0.1), dict(frequency_penalty=-0.1),
                    dict(repetition_penalty=1.1)):
        assert not Sampling(**options).greedy
