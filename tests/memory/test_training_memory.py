"""The memory of training beside what the operators truly keep and make, on tensors without contents.

PyTorch's fake tensors have shapes and types alone, and our kernels say what they return: so whole recipes run here in
seconds as they would on a GPU, but for what a kernel's launcher makes and gives up inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from live_bytes import Live, kernels_on_fake_tensors

from hinny import counts, memory
from hinny.config import ModelConfig, Recipe, load_recipe
from hinny.errors import ConfigError
from hinny.memory.layers import LAYER_BYTES, Share
from hinny.memory.training import WORKSPACE, Plan, phases
from hinny.model import Model
from hinny.objective import Objective
from hinny.parallel import context_layout
from hinny.parallel.context import SEAMS
from hinny.parallel.context_layout import Chunks
from hinny.parallel.recompute import apply_recompute
from hinny.train.segments import in_segments

B, T = 4, 2048
H100_BYTES = 72_000_000_000
KINDS = [("840m-hybrid", "M", {}), ("840m-hybrid", "*", {}), ("840m-hybrid", "-", {}), ("840m-mamba", "1", {}),
         ("840m-transformer", "*", {}), ("840m-transformer", "-", {"mlp": "relu2"}),
         ("840m-hybrid", "-", {"mlp": "swiglu"})]


def _autocast(bf16: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=bf16)


def _model(recipe: str, pattern: str | None = None, mlp: str | None = None) -> ModelConfig:
    model = load_recipe(recipe).model
    changes: dict[str, Any] = {} if pattern is None else {"pattern": pattern}
    if mlp is not None:
        assert model.mlp is not None
        changes["mlp"] = model.mlp.model_copy(update={"activation": mlp})
    return model.model_copy(update=changes)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("recipe", "symbol", "changes"), KINDS)
def test_a_layer_keeps_what_its_operators_save(
        recipe: str, symbol: str, changes: dict[str, str], bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(recipe, symbol, **changes)
    of = LAYER_BYTES[symbol](model, Share(B, T, width=2 if bf16 else 4))
    for mode, expected in ((None, of.kept + (2 * of.matrices if bf16 else 0)), ("selective", of.selective),
                           ("full", of.full)):
        with kernels_on_fake_tensors(monkeypatch):
            objective = Objective(Model(model))
            if mode is not None:
                apply_recompute(objective, mode)
            block = objective.model.blocks[0]
            x = torch.zeros(B, T, model.d_model, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
            with _autocast(bf16), Live() as live:
                y = block(x * 1, None, None)
                found = live.settle() - y.nbytes
        assert found == pytest.approx(expected, rel=0.01), mode


def _simulated(model: ModelConfig, mode: str | None, monkeypatch: pytest.MonkeyPatch,
               segments: int = 1) -> tuple[int, int]:
    """The most bytes alive in the forward pass with the loss, and in the backward, beside parameters and gradients; of
    the last of so many segments.
    """
    with kernels_on_fake_tensors(monkeypatch):
        objective = Objective(Model(model))
        if mode is not None:
            apply_recompute(objective, mode)
        for parameter in objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Live() as live:
            tokens, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)
            passes: Any = [((tokens, tokens, mask, None), None)]
            if segments > 1:
                passes = in_segments((tokens, tokens, mask, None), T // segments, objective.model.carry())
            for inputs, carried in passes:
                live.peak = live.settle()
                with _autocast():
                    loss, _ = objective(*inputs, carried)
                forward, live.peak = live.peak, live.settle()
                loss.backward()
                live.settle()
        return forward, live.peak


@pytest.mark.parametrize(("recipe", "mode"), [
    *(("840m-hybrid", mode) for mode in (None, "selective", "full")), ("840m-mamba2", "selective"),
    ("840m-transformer", None)])
def test_a_step_takes_what_it_truly_makes(recipe: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(recipe, load_recipe(recipe).model.pattern[:16])
    forward, backward = _simulated(model, mode, monkeypatch)
    found = phases(model, Plan({}, T, B, micro_batches=2, recompute=mode))
    states = 16 * counts.parameters(model).total + WORKSPACE
    # the loss's launcher makes inside: the head's weight and a block of logits in bf16, rows, and the rows' losses
    v, d, rows = model.vocab_size, model.d_model, 2048
    inside = 2 * v * d + 2 * rows * (v + d) + 8 * B * T
    assert sum(found["loss"].values()) - states == pytest.approx(forward + inside, rel=0.005)
    assert sum(found["backward"].values()) - states == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize(("recipe", "mode"), [("840m-mamba2", None), ("840m-mamba", "full"), ("840m-hybrid", "full")])
def test_a_segment_takes_what_it_truly_makes(recipe: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(recipe, load_recipe(recipe).model.pattern[:16])
    _, backward = _simulated(model, mode, monkeypatch, segments=4)
    plan = Plan({}, T // 4, B, micro_batches=1, recompute=mode, segments=4)
    found = phases(model, plan)["backward"]
    states = 16 * counts.parameters(model).total + WORKSPACE
    assert found["carried"] == 2 * B * counts.state_bytes(model) > 0
    assert found["gradients"] > 0  # of the segments before
    assert sum(found.values()) - states == pytest.approx(backward, rel=0.01)


def test_a_plan_with_segments_has_the_activations_of_one() -> None:
    whole, cut, short = (memory.peak(recipe.model, memory.plan(recipe))["parts"] for recipe in (
        _recipe("train.micro_batch_size=1", *changes) for changes in (
            [], ["train.segment_len=512"], ["train.seq_len=512"])))
    assert short["activations"] < cut["activations"] < 1.01 * short["activations"] < 0.3 * whole["activations"]
    assert "carried" not in whole
    assert cut["carried"] == 2 * counts.state_bytes(_recipe().model)


def _recipe(*changes: str) -> Recipe:
    return load_recipe("840m-hybrid", ["train.batch_size=16", "optim.warmup_samples=8", "train.cuda_graphs=false",
                                       *changes])


def test_states_are_sixteen_bytes_a_parameter_shared_by_the_shards() -> None:
    total = counts.parameters(_recipe().model).total
    for shards in (1, 2, 4):
        parts = phases(_recipe().model, memory.plan(_recipe(f"parallel.shard={shards}", "train.micro_batch_size=1")))
        states = sum(parts["update"][part] for part in ("weights", "gradients", "moments"))
        assert states == pytest.approx(16 * total / shards, abs=16 * shards)


def test_the_only_pass_of_a_step_has_no_gradients_before_it() -> None:
    model = _recipe().model
    single, several, recorded = (phases(model, memory.plan(_recipe(*changes))) for changes in (
        ["train.micro_batch_size=16"], ["train.micro_batch_size=8"],
        ["train.micro_batch_size=16", "train.cuda_graphs=true"]))
    assert single["loss"]["gradients"] == recorded["loss"]["gradients"] == 0
    assert several["loss"]["gradients"] == 4 * counts.parameters(model).total


def test_tensor_context_and_pipeline_divide_what_a_rank_keeps() -> None:
    def kept(*changes: str) -> int:
        recipe = _recipe("train.micro_batch_size=1", *changes)
        return phases(recipe.model, memory.plan(recipe))["loss"]["activations"]

    whole, pattern = kept(), _recipe().model.pattern
    assert 0.5 < kept("parallel.tensor=2") / whole < 0.65
    assert kept("parallel.context=2") / whole == pytest.approx(0.5, abs=0.03)
    halves = f"model.pattern={pattern[:24]}|{pattern[24:]}"
    assert kept(halves, "parallel.pipeline=2") / whole == pytest.approx(0.5, abs=0.06)
    # all micro-batches pass forward before the first passes back
    assert kept(halves, "parallel.pipeline=2", "parallel.schedule=gpipe") / whole == pytest.approx(8, rel=0.1)


def test_recomputation_of_some_kinds_lies_between_none_and_all() -> None:
    def of(mode: str) -> int:
        recipe = _recipe(*([f"parallel.recompute={mode}"] if mode else []))
        return int(memory.training(recipe, H100_BYTES)["memory_bytes"])

    assert of("full") < of('["M"]') < of('["*"]') < of("")
    assert of("full") < of("selective") < of("")


@pytest.mark.parametrize("recipe", ["840m-transformer", "840m-hybrid"])
def test_attention_of_packed_documents_keeps_no_mask_where_kernels_take_its_heads(
        recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(recipe, "*")
    of = LAYER_BYTES["*"](model, Share(B, T, packed=True))
    with kernels_on_fake_tensors(monkeypatch):
        block = Objective(Model(model)).model.blocks[0]
        x = torch.zeros(B, T, model.d_model, dtype=torch.bfloat16, requires_grad=True)
        segments = torch.zeros(B, T, dtype=torch.int32)
        with _autocast(), Live() as live:
            y = block(x * 1, None, segments)
            found = live.settle() - y.nbytes
    assert found == pytest.approx(of.kept + 2 * of.matrices, rel=0.01)


def test_packed_documents_cost_attention_its_mask_where_no_kernel_takes_its_heads() -> None:
    model, tokens = _model("840m-transformer", "*"), B * T
    c = model.attention
    assert c is not None
    for changes, width in (({}, 4), ({"head_dim": 96}, 2)):
        other = model.model_copy(update={"attention": c.model_copy(update={"positions": "none"} | changes)})
        plain, packed = (LAYER_BYTES["*"](other, Share(B, T, width=width, packed=packed)).kept
                         for packed in (False, True))
        assert packed - plain == width * tokens * T


def test_attention_of_one_of_four_context_ranks_keeps_all_keys_and_its_results_twice(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, ranks, chunk = _model("840m-hybrid", "*"), 4, T // 8
    assert model.attention is not None
    of = LAYER_BYTES["*"](model, Share(B, T // ranks, context=ranks))
    # what the others send is as large as what this rank has
    monkeypatch.setattr(context_layout, "gather", lambda x, dim, group: torch.cat([x] * ranks, dim))
    chunks = Chunks(1, ranks, group=None)  # type: ignore[arg-type]
    with kernels_on_fake_tensors(monkeypatch):
        block = Objective(Model(model)).model.blocks[0]
        for seam, function in SEAMS["*"].items():
            setattr(block.layer, seam, partial(function, chunks=chunks))
        x = torch.zeros(B, T // ranks, model.d_model, dtype=torch.bfloat16, requires_grad=True)
        with _autocast(), Live() as live:
            y = block(x * 1, None, None)
            found = live.settle() - y.nbytes
    # a CPU makes numbers of the masks of the second chunk's and the seventh's queries, a GPU none
    masks = 2 * chunk * (2 + 7) * chunk
    assert found - masks == pytest.approx(of.kept + 2 * of.matrices, rel=0.01)


def test_packed_attention_of_context_ranks_keeps_every_query_heads_keys_of_the_whole_sequence() -> None:
    model, length = _model("840m-hybrid", "*"), T // 4
    c = model.attention
    assert c is not None
    assert c.n_kv_heads < c.n_heads
    plain, packed = (LAYER_BYTES["*"](model, Share(1, length, context=4, packed=packed)).kept
                     for packed in (False, True))
    mask, shared, every = 2 * length * T, 2 * 2 * c.n_kv_heads * c.head_dim * T, 2 * 2 * c.n_heads * c.head_dim * T
    assert packed - plain == mask + every - shared


def test_the_smallest_number_of_devices_that_fits_is_found() -> None:
    recipe = load_recipe("8b-hybrid", ["train.micro_batch_size=1"])
    found = memory.training(recipe, H100_BYTES)
    needed = found["devices_needed"]
    assert found["fits"] is False
    assert memory.training(recipe, H100_BYTES, needed)["fits"] is True
    # the next smaller number that can share a batch of 1024 sequences
    assert memory.training(recipe, H100_BYTES, needed // 2)["fits"] is False
    with pytest.raises(ConfigError, match=r"train\.batch_size \(1024\) must be a multiple of .* = 3: each of 3 ranks"):
        memory.training(recipe, H100_BYTES, 3)
    with pytest.raises(ConfigError, match=r"train\.seq_len \(4096\) must be a multiple of .* = 3:"):
        memory.training(load_recipe("8b-hybrid", ["parallel.context=3"]), H100_BYTES)
    assert memory.training(load_recipe("8b-hybrid", ["train.seq_len=131072"]), H100_BYTES)["devices_needed"] is None


def test_no_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="devices is 0"):
        memory.training(_recipe(), H100_BYTES, devices=0)
