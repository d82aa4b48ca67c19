"""Predictions against ratios worked out by hand for the paper's 8B models, and the edges of what fits."""

from __future__ import annotations

import pytest

from hinny import counts, predict
from hinny.config import ModelConfig, ParallelConfig, load_recipe
from hinny.errors import ConfigError
from hinny.predict import HARDWARE

H100 = HARDWARE["H100"]
HYBRID = load_recipe("8b-hybrid").model
TRANSFORMER = load_recipe("8b-transformer").model
GQA8 = load_recipe("8b-transformer", ["model.attention.n_kv_heads=8"]).model
LENGTHS = (4096, 16384, 32768, 65536, 131072)
WINDOW_BYTES = 24 * 10240 * 2
"""What the release adds to the hybrid's state: it keeps w inputs of a convolution, hinny w - 1."""
RATIOS = [
    (1, TRANSFORMER, (1.11, 1.51, 2.03, 3.01, 4.79)),
    (32, TRANSFORMER, (4.04, 10.7, 15.8, 21.1, 25.4)),
    (32, GQA8, (1.48, 3.02, 4.22, 5.45, 6.45)),
    (64, GQA8, (1.82, 3.86, 5.12, 6.21, 6.98)),
]


@pytest.mark.parametrize(("batch", "base", "ratios"), RATIOS, ids=["1-MHA", "32-MHA", "32-GQA8", "64-GQA8"])
def test_bytes_of_a_decode_step_have_the_ratios_of_the_bandwidth_formula(
        batch: int, base: ModelConfig, ratios: tuple[float, ...]) -> None:
    for length, expected in zip(LENGTHS, ratios, strict=True):
        transformer, hybrid = (predict.decode_bytes(model, batch, length, state_dtype_bytes=2, conv_dtype_bytes=2)
                               for model in (base, HYBRID))
        hybrid += 2 * batch * WINDOW_BYTES
        # half of the last printed digit
        assert transformer / hybrid == pytest.approx(expected, abs=0.05 if expected > 10 else 0.005)


def test_weights_cache_and_state_are_those_of_the_released_models() -> None:
    assert counts.decode_weight_bytes(TRANSFORMER) == pytest.approx(14.98e9, abs=5e6)
    assert counts.decode_weight_bytes(GQA8) == pytest.approx(13.37e9, abs=5e6)
    assert counts.decode_weight_bytes(HYBRID) == pytest.approx(15.21e9, abs=5e6)
    assert [counts.kv_bytes_per_token(m) for m in (TRANSFORMER, GQA8, HYBRID)] == [524_288, 131_072, 16_384]
    released = {"dtype_bytes": 2, "conv_dtype_bytes": 2}
    assert counts.state_bytes(HYBRID, **released) == 52_297_728 - WINDOW_BYTES
    assert counts.state_bytes(load_recipe("8b-mamba2").model, **released) == 122_028_032 - 56 * 10240 * 2
    assert counts.state_bytes(TRANSFORMER) == 0


def test_shorter_states_leave_the_convolutions_as_they_are() -> None:
    wide, half = (predict.decode_bytes(HYBRID, 32, 1, state_dtype_bytes=width) for width in (4, 2))
    assert wide - half == 2 * 32 * 24 * 2 * 128 * 64 * 128  # read and written: 24 layers, 128 heads of 64 x 128
    model = load_recipe("tiny-mamba").model
    assert counts.state_bytes(model, dtype_bytes=2) == counts.state_bytes(model) - 4 * 2 * 256 * 16


def test_decode_time_is_bytes_over_bandwidth_where_that_is_slower() -> None:
    found = predict.decode(HYBRID, H100, batch=32, context=16384)
    assert found["limit"] == "bandwidth"
    assert found["seconds"] == predict.decode_bytes(HYBRID, 32, 16384) / 3.35e12
    assert found["tokens_per_s"] == 32 / found["seconds"]


def test_decode_time_is_flops_over_the_peak_at_a_large_batch() -> None:
    # a stack of MLPs holds nothing per sequence: the larger the batch, the less of the time is the weights'
    mlp = TRANSFORMER.model_copy(update={"pattern": "-" * 32})
    found = predict.decode(mlp, H100, batch=4096, context=1)
    assert found["limit"] == "compute"
    assert found["seconds"] == pytest.approx(4096 * counts.decode_flops(mlp, 1) / 989.4e12)
    assert found["max_batch"] is None


def test_prefill_and_training_run_at_the_assumed_share_of_the_peak() -> None:
    half, full = (predict.prefill(HYBRID, H100, batch=1, context=4096, mfu=mfu) for mfu in (0.5, 1.0))
    assert half["seconds"] == pytest.approx(2 * full["seconds"])
    # logits of one position only
    flops = 4096 * counts.forward_flops(HYBRID, 4096) - 4095 * counts.head_flops(HYBRID)
    assert full["seconds"] == pytest.approx(flops / 989.4e12)
    # the paper's MFU on H100, 30.7 and 29.9 %, at Megatron's FLOPs: equal speed
    speeds = [predict.training_speed(model, H100, seq_len=4096, mfu=mfu)
              for model, mfu in ((TRANSFORMER, 0.307), (HYBRID, 0.299))]
    assert speeds == pytest.approx([6306, 6354], rel=0.01)


def test_what_is_computed_again_takes_its_share_of_the_time() -> None:
    plain = predict.training_speed(HYBRID, H100, seq_len=131072, mfu=0.4)
    model = counts.training_flops(HYBRID, 131072)
    assert predict.training_speed(HYBRID, H100, seq_len=131072, mfu=0.4, recomputed=model) == pytest.approx(plain / 2)
    # a whole forward pass again but for the head and the blocks' last products: less than a third more
    again = counts.recomputed_flops(HYBRID, 131072, ParallelConfig(recompute="full"))
    last = 2 * (24 * 8192 * 4096 + 4 * 4096 * 4096 + 28 * 16384 * 4096)
    assert again == model / 3 - counts.head_flops(HYBRID) - last
    slower = predict.training_speed(HYBRID, H100, seq_len=131072, mfu=0.4, recomputed=again)
    assert slower == pytest.approx(0.4 * 989.4e12 / (model + again))


@pytest.mark.parametrize(("recompute", "again"), [(None, ""), ("selective", ""), ("full", "M*-"), (["*", "-"], "*-")])
def test_kinds_that_run_again_count_each_by_itself(recompute: str | list[str] | None, again: str) -> None:
    alone = {kind: counts.recomputed_flops(HYBRID, 4096, ParallelConfig(recompute=[kind])) for kind in "M*-"}
    assert min(alone.values()) > 0
    found = counts.recomputed_flops(HYBRID, 4096, ParallelConfig(recompute=recompute))
    assert found == sum(alone[kind] for kind in again)


def test_a_calibrated_device_takes_longer_by_its_share_and_by_its_layers_with_the_root_of_the_sequences() -> None:
    reached = predict.Calibration(share=0.8, layer=5e-6, sum=12e-6, source="")
    found = predict.decode(TRANSFORMER, H100, batch=32, context=4096, calibration=reached)
    bytes_ = 14.98e9 + 32 * 4096 * 524_288
    assert found["seconds"] == pytest.approx(bytes_ / (0.8 * 3.35e12) + 64 * 5e-6 * 32 ** 0.5, rel=1e-3)
    assert found["tokens_per_s"] == 32 / found["seconds"]


def test_two_gpus_move_half_each_and_sum_every_layer() -> None:
    plain = predict.decode(TRANSFORMER, H100, batch=32, context=4096)
    halved = predict.decode(TRANSFORMER, H100, batch=32, context=4096, tensor=2)
    assert halved["seconds"] == pytest.approx(plain["seconds"] / 2)
    assert halved["memory_bytes"] == pytest.approx(plain["memory_bytes"] / 2, rel=1e-9)
    assert not plain["fits"]
    assert halved["fits"]
    summed = predict.decode(TRANSFORMER, H100, batch=32, context=4096, tensor=2,
                            calibration=predict.Calibration(1.0, 0.0, 12e-6, ""))
    assert summed["seconds"] == pytest.approx(halved["seconds"] + 64 * 12e-6)
    with pytest.raises(ConfigError, match="no sums over GPUs"):
        predict.decode(TRANSFORMER, H100, batch=1, context=1, tensor=2,
                       calibration=predict.Calibration(1.0, 0.0, None, ""))


@pytest.mark.parametrize("model", [HYBRID, TRANSFORMER, GQA8], ids=["hybrid", "MHA", "GQA8"])
def test_the_largest_batch_fits_and_one_more_does_not(model: ModelConfig) -> None:
    largest = predict.inference_memory(model, H100, batch=1, context=16384)["max_batch"]
    assert largest > 0
    assert predict.decode(model, H100, batch=largest, context=16384)["fits"] is True
    over = predict.decode(model, H100, batch=largest + 1, context=16384)
    assert over["fits"] is False
    assert over["memory_bytes"] > over["usable_bytes"]


def test_a_model_larger_than_the_memory_says_that_not_one_sequence_fits() -> None:
    found = predict.decode(TRANSFORMER, HARDWARE["RTX4090"], batch=1, context=131072)
    assert found["fits"] is False
    assert found["max_batch"] == 0


def test_unknown_hardware_is_refused_with_the_nearest_or_all_names() -> None:
    with pytest.raises(ConfigError, match=r"'H10O' is not known\. Did you mean H100"):
        predict.find_hardware("H10O")
    with pytest.raises(ConfigError, match="Known: A100, H100, H200, B200"):
        predict.find_hardware("abacus")


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_of_the_peak_outside_0_to_1_is_refused(mfu: float) -> None:
    with pytest.raises(ConfigError, match="mfu is"):
        predict.prefill(HYBRID, H100, batch=1, context=16, mfu=mfu)
    with pytest.raises(ConfigError, match="mfu is"):
        predict.training_speed(HYBRID, H100, seq_len=16, mfu=mfu)


def test_batches_and_contexts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch is 0"):
        predict.decode(HYBRID, H100, batch=0, context=1)
    with pytest.raises(ConfigError, match="context is -1"):
        predict.decode(HYBRID, H100, batch=1, context=-1)
