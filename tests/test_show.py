"""The verb `show`: one object of figures, its text, and no torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

import hinny
from hinny import counts, predict
from hinny.config import load_recipe
from hinny.errors import ConfigError
from hinny.show import quantity, render, show, show_pattern

PATTERN_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def text_of(figures: dict, width: int = 120) -> str:
    return render(figures, Console(file=io.StringIO(), width=width))


def test_recipes_are_shown_without_torch() -> None:
    code = ("import sys, hinny.counts, hinny.predict, hinny.show, hinny.config, hinny.pattern\n"
            "from hinny.config import load_recipe\n"
            "print(hinny.show.render(hinny.show.show(load_recipe('8b-hybrid')))[:9])\n"
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "8b-hybrid", "")


def test_the_figures_of_the_8b_hybrid_are_exact_and_survive_json() -> None:
    figures = show(load_recipe("8b-hybrid"))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["name"] == "8b-hybrid"
    assert figures["parameters"] == 8_654_517_248
    assert figures["non_embedding"] == 6_557_365_248
    assert figures["pattern"] == PATTERN_8B
    assert figures["layers"] == {"Mamba-2": 24, "attention": 4, "MLP": 28}
    assert sum(figures["parameters_by_part"].values()) == 8_654_517_248
    assert figures["flops_per_token"] == figures["flops_per_token_training"] == 3 * figures["flops_per_token_forward"]
    assert figures["state_bytes"] == counts.state_bytes(load_recipe("8b-hybrid").model)
    assert figures["kv_bytes_per_token"] == 16_384
    assert figures["training_tokens"] == pytest.approx(3.5e12, rel=1e-6)


def test_the_verb_is_the_function_of_the_package() -> None:
    recipe = load_recipe("tiny-mamba")
    assert hinny.show(recipe) == show(recipe)


def test_predictions_are_for_the_hardware_batch_and_contexts_asked_for() -> None:
    figures = show(load_recipe("8b-mamba2"), hardware="H200", batch=7, contexts=(100, 200), mfu=0.5)
    decode, prefill = figures["predictions"]["decode"], figures["predictions"]["prefill"]
    assert [(d["hardware"], d["batch"], d["context"]) for d in decode] == [("H200", 7, 100), ("H200", 7, 200)]
    assert [p["mfu"] for p in prefill] == [0.5, 0.5]
    assert figures["predictions"]["assumptions"]["bandwidth"] == 4.8e12
    with pytest.raises(ConfigError, match="not known"):
        show(load_recipe("8b-mamba2"), hardware="Z80")


def test_training_that_computes_again_is_slower_at_the_same_share_of_the_peak() -> None:
    plain, full = (show(load_recipe("8b-hybrid", [f"parallel.recompute={mode}"]), mfu=0.45)
                   for mode in ("selective", "full"))
    assert plain["recomputed_flops_per_token"] == 0
    assert plain["predictions"]["training_mfu"] == pytest.approx(0.45)
    assert "computed again" not in text_of(plain)
    again, model = full["recomputed_flops_per_token"], full["flops_per_token_training"]
    assert model == plain["flops_per_token_training"]
    found = full["predictions"]
    assert found["training_tokens_per_s_per_device"] == pytest.approx(0.45 * 989.4e12 / (model + again))
    assert found["training_mfu"] == pytest.approx(0.45 * model / (model + again))
    said = " ".join(text_of(full).split())
    assert f"computed again {quantity(again)}FLOP" in said
    assert f"at 45% of the peak: training {found['training_tokens_per_s_per_device']:,.0f} tokens/s" in said
    assert f"an MFU of {found['training_mfu']:.1%} without what is computed again" in said
    # reading a prompt computes nothing again
    assert found["prefill"] == plain["predictions"]["prefill"]


def test_decoding_is_predicted_by_the_constants_of_a_device_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CALIBRATED", {})
    plain = show(load_recipe("8b-hybrid"))
    assert plain["predictions"]["assumptions"]["calibration"] is None
    assert "at the data sheet's bandwidth: this device was not timed" in " ".join(text_of(plain).split())
    monkeypatch.setitem(predict.CALIBRATED, "H100", predict.Calibration(0.8, 1e-5, None, "a machine, commit x"))
    timed = show(load_recipe("8b-hybrid"))
    assert json.loads(json.dumps(timed)) == timed
    for before, after in zip(plain["predictions"]["decode"], timed["predictions"]["decode"], strict=True):
        assert after["seconds"] == pytest.approx(before["seconds"] / 0.8 + 56 * 1e-5 * after["batch"] ** 0.5)
    text = " ".join(text_of(timed).split())
    assert ("at 80.0% of the bandwidth and with 10.0 µs more a layer, times the root of the sequences, as was measured "
            "(a machine, commit x)") in text


def test_a_model_cut_over_gpus_is_predicted_with_the_sums_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CALIBRATED", {})
    cut = load_recipe("8b-hybrid", ["parallel.tensor=2"])
    one, two = show(load_recipe("8b-hybrid"), hardware="H200"), show(cut, hardware="H200")
    assert "Predicted on 2 H200" in text_of(two)
    for alone, halved in zip(one["predictions"]["decode"], two["predictions"]["decode"], strict=True):
        assert halved["seconds"] == pytest.approx(alone["seconds"] / 2)
        assert halved["memory_bytes"] == pytest.approx(alone["memory_bytes"] / 2)
    for alone, halved in zip(one["predictions"]["prefill"], two["predictions"]["prefill"], strict=True):
        assert halved["seconds"] == pytest.approx(alone["seconds"] / 2)
    monkeypatch.setitem(predict.CALIBRATED, "H200", predict.Calibration(0.8, 1e-5, None, "a machine"))
    assert show(cut, hardware="H200")["predictions"]["decode"] == two["predictions"]["decode"]
    said = " ".join(text_of(show(cut, hardware="H200")).split())
    assert "sums over several of this device were not timed" in said
    monkeypatch.setitem(predict.CALIBRATED, "H200", predict.Calibration(0.8, 1e-5, 3e-6, "a machine"))
    summed = show(cut, hardware="H200")
    for halved, timed in zip(two["predictions"]["decode"], summed["predictions"]["decode"], strict=True):
        assert timed["seconds"] == pytest.approx(halved["seconds"] / 0.8 + 56 * (1e-5 * timed["batch"] ** 0.5 + 3e-6))
    said = " ".join(text_of(summed).split())
    assert "10.0 µs more a layer, times the root of the sequences and 3.0 µs a layer's sum over GPUs" in said


def test_training_memory_is_a_sum_of_parts_for_the_recipes_precision_and_the_devices() -> None:
    half, full = (show(load_recipe("tiny-mamba2", [f'train.precision="{p}"']))["memory"]["training"]
                  for p in ("bf16", "fp32"))
    assert full["parts"]["activations"] > 1.5 * half["parts"]["activations"]
    for training in (half, full):
        assert training["memory_bytes"] == sum(training["parts"].values()) == training["phases"][training["phase"]]
    one, four = (show(load_recipe("8b-mamba2"), devices=n)["memory"]["training"] for n in (1, 4))
    assert one["parts"]["moments"] == 4 * four["parts"]["moments"]
    assert (one["devices"], four["devices"]) == (1, 4)
    cut = show(load_recipe("8b-mamba2", ["parallel.tensor=2", "parallel.shard=2"]))["memory"]["training"]
    assert cut["devices"] == 4
    with pytest.raises(ConfigError, match="there are 3 processes"):
        show(load_recipe("8b-mamba2", ["parallel.tensor=2"]), devices=3)


def test_sequences_in_segments_have_the_flops_and_activations_of_a_segment() -> None:
    cut, short = (show(load_recipe("8b-hybrid", [f"train.seq_len={length}", *more]))
                  for length, more in ((16384, ["train.segment_len=4096"]), (4096, [])))
    for name in ("flops_length", "flops_per_token", "flops_per_token_forward", "flops_per_token_training"):
        assert cut[name] == short[name], name
    assert cut["training_tokens"] == 4 * short["training_tokens"]
    speeds = [figures["predictions"]["training_tokens_per_s_per_device"] for figures in (cut, short)]
    assert speeds[0] == speeds[1]
    parts = cut["memory"]["training"]["parts"]
    assert parts["activations"] < 1.01 * short["memory"]["training"]["parts"]["activations"]
    micro_batch = load_recipe("8b-hybrid").train.micro_batch_size
    assert parts["carried"] == 2 * micro_batch * cut["state_bytes"]
    assert "carried" in text_of(cut)


def test_the_text_shows_sizes_pattern_log_and_what_does_not_fit() -> None:
    text = text_of(show(load_recipe("8b-hybrid")))
    for line in ("8,654,517,248", PATTERN_8B, "24 Mamba-2, 4 attention, 28 MLP",
                 "Hybrid allocation (M is mamba, * is attention, - is mlp):",
                 "Target attention ratio: 0.08. Actual attention ratio: 0.07.",
                 "does not fit", "only batch 1", "Arithmetic, not measured", "moments", "activations"):
        assert line in text
    assert "does not fit" not in text_of(show(load_recipe("tiny-hybrid")))


def test_serving_memory_is_that_of_the_engines_pools() -> None:
    from hinny.infer.limits import PAGE

    figures = show(load_recipe("8b-hybrid"))
    assert figures["memory"]["serving"] == {"page_tokens": PAGE, "page_bytes": PAGE * 4 * 2 * 1024 * 2,
                                            "slot_bytes": 4 * 24 * (128 * 64 * 128 + 3 * 10240)}
    assert "a page of 64 tokens" in text_of(figures)


def test_shorter_weights_are_shown_beside_bfloat16() -> None:
    figures = show(load_recipe("8b-transformer"))
    layers, heads = 32, 2 * 4096 * 256000 * 2
    numbers, rows = layers * (4 * 4096 * 4096 + 2 * 4096 * 16384), layers * (4 * 4096 + 16384 + 4096)
    bf16, found = figures["memory"]["weights_bf16_bytes"], figures["memory"]["weights_quantised_bytes"]
    norms = bf16 - heads - 2 * numbers
    assert found["int8"] == found["fp8"] == heads + numbers + 4 * rows + 2 * norms
    assert "B, bf16; " in text_of(figures)
    assert found["int4"] < found["int8"] < bf16


def test_a_pattern_given_as_such_has_no_allocation_log() -> None:
    figures = show(load_recipe("8b-transformer"))
    assert figures["allocation"] == []
    assert "Hybrid allocation" not in text_of(figures)


def test_a_long_pattern_is_drawn_whole_in_rows_under_a_ruler() -> None:
    text = text_of(show(load_recipe("8b-transformer")), width=80)
    assert [line.strip() for line in text.splitlines() if set(line.strip()) == {"*", "-"}] == ["*-" * 30, "*-" * 2]
    assert any(line.split() == ["0", "10", "20", "30", "40", "50"] for line in text.splitlines())


def test_a_recipe_that_overrides_its_ratios_shows_both_patterns() -> None:
    allocated = load_recipe("tiny-hybrid").model.pattern
    moved = allocated[::-1]
    assert moved != allocated
    figures = show(load_recipe("tiny-hybrid", [f"model.pattern={moved}"]))
    assert figures["pattern"] == moved
    assert figures["allocation"][:4] == [
        "Using hybrid override pattern", "Warning: overriding pattern A with pattern B",
        f"A: {allocated}", f"B: {moved}"]


def test_a_pattern_alone_is_shown_with_counts_positions_and_log() -> None:
    figures = show_pattern(56, 0.08, 0.5)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["pattern"] == PATTERN_8B
    assert figures["layers"] == {"Mamba-2": 24, "attention": 4, "MLP": 28}
    assert figures["attention_at"] == [10, 22, 33, 45]
    assert figures["allocation"][1] == PATTERN_8B
    assert PATTERN_8B in text_of(figures)
    same = show_pattern(56, 0.08, 0.5, PATTERN_8B)
    assert same["allocation"][:2] == ["Using hybrid override pattern",
                                      "The override pattern matches the overridden pattern"]


def test_attention_positions_do_not_count_pipeline_cuts() -> None:
    assert show_pattern(4, 0.25, 0.0, "MM|*M")["attention_at"] == [2]


@pytest.mark.parametrize(("value", "text"), [(0, "0 "), (999, "999 "), (1000, "1 k"), (52_297_728, "52.3 M"),
                                             (8.65e9, "8.65 G"), (9.9e14, "990 T"), (2.25e15, "2.25 P")])
def test_quantities_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(("recipe", "changes", "said"), [
    ("8b-hybrid", ["parallel.tensor=16"], r"parallel\.tensor \(16\) must divide model\.mamba2\.n_groups \(8\)"),
    ("8b-transformer", ["parallel.tensor=64"], r"parallel\.tensor \(64\) must divide model\.attention\.n_kv_heads"),
    ("8b-hybrid", ["parallel.context=3"], r"train\.seq_len \(4096\) must be a multiple of parallel\.context \(3\)"),
    ("8b-hybrid", ["parallel.context=4", "train.seq_len=4100"], r"\(4100\) must be a multiple of 2 x .* = 8,"),
    ("8b-hybrid", ["parallel.context=4", "train.seq_len=16"], r"chunks of 2 tokens .* d_conv = 4 borrows 3"),
    ("8b-hybrid", ["parallel.replicate=3"], r"train\.batch_size \(1024\) must be a multiple of .* \(3\) x .* = 6:"),
    ("840m-hybrid", ["parallel.shard=2"], r"train\.cuda_graphs is true and this training is on 2 processes: .* Give "
                                          r"train\.cuda_graphs=false"),
])
def test_what_training_would_refuse_is_refused(recipe: str, changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        show(load_recipe(recipe, changes))


def test_graphs_are_refused_on_the_devices_that_are_asked_for() -> None:
    assert show(load_recipe("840m-hybrid"), devices=1)["memory"]["training"]["devices"] == 1
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs is true and this training is on 4 processes"):
        show(load_recipe("840m-hybrid"), devices=4)
    # without them it fits on more: how many is told of a recipe that has them
    wide = load_recipe("840m-hybrid", ["train.micro_batch_size=1", "model.d_model=8192", "model.n_layers=50"])
    training = show(wide)["memory"]["training"]
    assert not training["fits"]
    assert training["devices_needed"] > 1


def test_a_pipeline_of_other_stages_than_the_pattern_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 2, but model\.pattern has 1 stages"):
        show(load_recipe("tiny-hybrid", ["parallel.pipeline=2"]))
