"""The meter's figures are those of a clock, and of the device's peak rate."""

import pytest
import torch

from hinny.train.metrics import RECENT, Meter, peak_memory, seconds_at_peak

FLOPS = 3 * (2 * 2 * 16 * 32 + 2 * 16 * 257)
"""Of one trained token, by hand: two matrices of 16 x 32, a head of 16 x 257, forward and twice that backward."""


def test_tokens_per_second_are_those_since_the_last_record():
    meter = Meter(tokens_per_step=100, steps=10)
    meter.add(1.0)
    meter.add(3.0)
    assert meter.record() == {"tokens_per_s": 50.0, "data_seconds": 0.0, "seconds": 4.0}
    meter.add(0.5)
    assert meter.record() == {"tokens_per_s": 200.0, "data_seconds": 0.0, "seconds": 4.5}


def test_mfu_is_the_share_of_the_time_that_the_peak_rate_would_take():
    meter = Meter(tokens_per_step=100, steps=10, seconds_at_peak=0.004)
    meter.add(1.0)
    meter.add(0.5)
    assert meter.speed() == {"tokens_per_s": pytest.approx(200 / 1.5), "mfu": pytest.approx(2 * 0.4 / 1.5)}
    assert meter.record()["mfu"] == pytest.approx(2 * 0.4 / 1.5)
    meter.add(0.5)
    assert meter.record()["mfu"] == pytest.approx(0.8)


def test_the_wait_for_data_is_the_mean_since_the_last_record():
    meter = Meter(tokens_per_step=100, steps=10)
    meter.add(1.0, waited=0.25)
    meter.add(1.0, waited=0.75)
    assert meter.record()["data_seconds"] == 0.5
    meter.add(1.0, waited=0.125)
    assert meter.record()["data_seconds"] == 0.125


@pytest.mark.parametrize(("precision", "device", "rate"), [
    ("bf16", "NVIDIA H100 80GB HBM3", 989.4e12), ("fp32", "NVIDIA H100 80GB HBM3", 66.9e12),
    ("bf16", "NVIDIA H200", 989.4e12), ("bf16", "NVIDIA B200", 2250e12),
])
def test_a_token_takes_its_flops_over_the_peak_of_the_precision(recipe_of, caplog, precision, device, rate):
    with caplog.at_level("INFO", logger="hinny"):
        assert seconds_at_peak(recipe_of("-", precision=precision), device) == pytest.approx(FLOPS / rate, rel=1e-12)
    assert not caplog.text


def test_a_token_of_a_segment_attends_to_its_segment_alone(recipe_of):
    cut, short = (seconds_at_peak(recipe_of("M*", **train), "NVIDIA H200")
                  for train in ({"seq_len": 32, "segment_len": 8}, {"seq_len": 8}))
    assert cut == short < seconds_at_peak(recipe_of("M*", seq_len=32), "NVIDIA H200")


@pytest.mark.parametrize(("precision", "device", "said"), [
    ("bf16", None, "no peak rate of a CPU in bf16"), ("bf16", "NVIDIA H100 PCIe", "no peak rate of NVIDIA H100 PCIe"),
    ("bf16", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "MIG"), ("fp32", "NVIDIA B200", "NVIDIA B200 in fp32"),
])
def test_a_device_without_a_known_peak_has_no_mfu_and_the_log_says_so_once(recipe_of, caplog, precision, device, said):
    with caplog.at_level("INFO", logger="hinny"):
        assert seconds_at_peak(recipe_of("-", precision=precision), device) is None
    assert len(caplog.records) == 1
    assert said in caplog.text


def test_float32_products_in_tf32_have_no_mfu(recipe_of, caplog):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with caplog.at_level("INFO", logger="hinny"):
            assert seconds_at_peak(recipe_of("-"), "NVIDIA H100 80GB HBM3") is None
            assert seconds_at_peak(recipe_of("-", precision="bf16"), "NVIDIA H100 80GB HBM3") is not None
    finally:
        torch.set_float32_matmul_precision(before)
    assert '"high"' in caplog.text


def test_peak_memory_is_that_of_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.index == 1 else 0)
    assert peak_memory(torch.device("cpu")) == {}
    assert peak_memory(torch.device("cuda", 1)) == {"peak_memory_bytes": 7}


def test_seconds_go_on_from_the_session_before():
    meter = Meter(tokens_per_step=100, steps=10, seconds=60.0)
    meter.add(1.0)
    assert meter.record()["seconds"] == 61.0


def test_time_left_follows_the_recent_steps():
    meter = Meter(tokens_per_step=10, steps=100)
    for seconds in [100.0] + [2.0] * RECENT:
        meter.add(seconds)
    assert meter.seconds_left(RECENT + 1) == pytest.approx((100 - RECENT - 1) * 2.0)
    assert meter.speed() == {"tokens_per_s": pytest.approx(5.0)}
