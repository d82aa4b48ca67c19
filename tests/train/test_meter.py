"""The meter's figures are those of a clock."""

import pytest

from hinny.train.metrics import RECENT, Meter


def test_tokens_per_second_are_those_since_the_last_record():
    meter = Meter(tokens_per_step=100, steps=10)
    meter.add(1.0)
    meter.add(3.0)
    assert meter.record() == {"tokens_per_s": 50.0, "seconds": 4.0}
    meter.add(0.5)
    assert meter.record() == {"tokens_per_s": 200.0, "seconds": 4.5}


def test_seconds_go_on_from_the_session_before():
    meter = Meter(tokens_per_step=100, steps=10, seconds=60.0)
    meter.add(1.0)
    assert meter.record()["seconds"] == 61.0


def test_time_left_follows_the_recent_steps():
    meter = Meter(tokens_per_step=10, steps=100)
    for seconds in [100.0] + [2.0] * RECENT:
        meter.add(seconds)
    assert meter.seconds_left(RECENT + 1) == pytest.approx((100 - RECENT - 1) * 2.0)
    assert meter.tokens_per_s == pytest.approx(5.0)
