"""Segments carry states: exact forward passes, gradients cut between segments, and nothing else is different."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_segments import Plain
from ranks import run_ranks
from small import small_config, small_model
from torch import Tensor

from hinny.checkpoint import load_model
from hinny.config import DIMENSIONS, AttentionConfig, ParallelConfig, Recipe, to_toml, validate
from hinny.config.fit import check_fit
from hinny.config.load import read_toml
from hinny.data.mix import Batch
from hinny.errors import CheckpointError, ConfigError
from hinny.evals.entry import Subject
from hinny.evals.options import EvalOptions
from hinny.objective import Objective
from hinny.parallel.recompute import apply_recompute
from hinny.run import Run
from hinny.state import Carried
from hinny.tokenizer import ByteTokenizer
from hinny.train.loop import train
from hinny.train.segments import in_segments
from hinny.train.step import Stepper

CPU = torch.device("cpu")
ROWS, LENGTH = 5, 24
PATTERNS = ["1", "M", "1*M-"]


def stepper(recipe_of: Any, pattern: str, segment: int | None, recompute: str | None = None, **train: Any) -> Stepper:
    """Of the float64 model of tests/small.py; sequences of LENGTH tokens in segments of `segment`."""
    recipe = recipe_of(pattern, seq_len=LENGTH, segment_len=segment, batch_size=ROWS, **{"micro_batch_size": ROWS,
                                                                                        **train})
    recipe = recipe.model_copy(update={"model": small_config(pattern)})
    objective = Objective(small_model(pattern), z_loss=0.01)
    if recompute is not None:
        apply_recompute(objective, recompute)
    return Stepper(recipe, objective, torch.optim.SGD(objective.parameters(), lr=0.1), CPU)


def batch_of(seed: int = 0, packed: bool = True) -> Batch:
    """Documents at random places in the first rows; in the last ones on, before and behind the edges of segments of 2,
    6 and 12 tokens, with ids that come back.
    """
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(37, size=(2, ROWS, LENGTH))
    documents = (draw.random((ROWS, LENGTH)) < 0.15).cumsum(1)
    documents[3] = np.repeat([4, 7, 4, 7], 6)
    documents[4] = np.isin(np.arange(LENGTH), [11, 13]).cumsum()
    return Batch(tokens, targets, draw.random((ROWS, LENGTH)) < 0.8, documents if packed else None, ("drawn",))


def gradients(of: Stepper) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in of.objective.named_parameters()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("segment", [2, 6, 12])  # 2: fewer than the convolution's window has
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_in_segments_is_the_whole_graph_with_detached_edges(recipe_of, pattern, segment, packed):
    ours, batch = stepper(recipe_of, pattern, segment), batch_of(segment, packed)
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    if packed:
        documents[:, 1:] = torch.from_numpy(batch.segments[:, 1:] != batch.segments[:, :-1]).cumsum(1)
    mask, targets = torch.from_numpy(batch.mask), torch.from_numpy(batch.targets)
    plain = Plain(small_model(pattern), documents, segment)
    logits = plain.logits(torch.from_numpy(batch.tokens))[mask]
    entropy, z_loss = F.cross_entropy(logits, targets[mask]), 0.01 * (logits.logsumexp(-1) ** 2).mean()
    (entropy + z_loss).backward()
    found, found_z = ours.accumulate(batch)
    assert found.item() == pytest.approx(entropy.item(), rel=1e-6)  # added up in float32
    assert found_z.item() == pytest.approx(z_loss.item(), rel=1e-6)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(gradients(ours)[f"model.{name}"], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("pattern", ["1-", "M-"])
def test_without_attention_the_losses_are_those_of_whole_sequences_and_the_gradients_are_not(recipe_of, pattern):
    batch = batch_of()
    cut, whole = stepper(recipe_of, pattern, 6), stepper(recipe_of, pattern, None)
    losses = [one.accumulate(batch)[0].item() for one in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    rates = [gradients(one)["model.layers.0.layer.A_log"] for one in (cut, whole)]
    assert (rates[0] - rates[1]).abs().max() > 1e-3 * rates[1].abs().max()


def test_held_out_losses_are_of_whole_sequences(recipe_of):
    batch = batch_of()
    cut, whole = stepper(recipe_of, "1*M-", 6), stepper(recipe_of, "1*M-", None)
    assert cut.loss_sum(batch) == whole.loss_sum(batch)
    # attention sees less in a segment, so the training loss is another
    assert abs(cut.accumulate(batch)[0] - whole.accumulate(batch)[0]) > 1e-3


@pytest.mark.parametrize("segment", [6, None])
def test_attention_sees_its_own_segment_alone(recipe_of, segment):
    """With Mamba layers silenced only attention could tell the last segment what the first one was."""
    batch = batch_of(packed=False)
    late = np.broadcast_to(np.arange(LENGTH) >= 18, batch.mask.shape)
    other = replace(batch, tokens=np.where(np.arange(LENGTH) < 6, 36 - batch.tokens, batch.tokens))
    ours = stepper(recipe_of, "M*-", segment)
    torch.nn.init.zeros_(ours.objective.model.blocks[0].layer.out_proj.weight)
    first, second = (ours.accumulate(replace(given, mask=late))[0].item() for given in (batch, other))
    assert (first == second) == (segment is not None)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_recomputed_blocks_give_the_same_bits(recipe_of, pattern, mode):
    plain, again = stepper(recipe_of, pattern, 6), stepper(recipe_of, pattern, 6, mode)
    batch = batch_of()
    assert plain.accumulate(batch) == again.accumulate(batch)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(again)[name], gradient), name


@pytest.mark.parametrize("mode", [None, "full", "selective"])
def test_what_a_segment_begins_with_is_neither_changed_nor_differentiated(mode):
    objective = Objective(small_model("1M-"))
    if mode is not None:
        apply_recompute(objective, mode)
    batch = batch_of()
    inputs = tuple(torch.from_numpy(part) for part in (batch.tokens, batch.targets, batch.mask, batch.segments))
    for piece, carried in in_segments(inputs, 6, objective.model.carry()):
        begun = [(layer.conv, layer.ssm) for layer in carried.layers if layer is not None]
        before = [tensor.clone() for pair in begun for tensor in pair if tensor is not None]
        objective(*piece, carried)[0].backward()
        after = [tensor for pair in begun for tensor in pair if tensor is not None]
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(after, before, strict=True))
        left = [tensor for layer in carried.layers if layer is not None for tensor in layer.left]
        assert not any(tensor.requires_grad for tensor in left)
        assert {id(tensor) for tensor in left}.isdisjoint({id(tensor) for tensor in after})


def test_micro_batches_in_segments_give_the_gradient_of_the_whole_batch(recipe_of):
    whole, cut = stepper(recipe_of, "1*M-", 6), stepper(recipe_of, "1*M-", 6, micro_batch_size=1)
    batch = batch_of()
    batch.mask[1, 6:] = False  # segments without a target
    batch.mask[2] = False
    assert whole.accumulate(batch)[0].item() == pytest.approx(cut.accumulate(batch)[0].item(), rel=1e-6)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_a_state_of_inference_and_segments_still_exclude_each_other():
    model, tokens = small_model("M*"), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="state and segments exclude each other"):
        model.hidden(tokens, model.init_state(2), tokens)
    assert isinstance(model.carry(), Carried)
    assert model.carry().layers[1] is None


REFUSED = {
    "just shorter sequences. Remove it and give train.seq_len=8": ("*-", {"segment_len": 8}, {}),
    "must be below train.seq_len": ("M", {"segment_len": 32}, {}),
    "must divide train.seq_len": ("M", {"segment_len": 12}, {}),
    "parallel.context=1": ("M", {"segment_len": 8}, {"context": 2}),
    "parallel.pipeline=1": ("M|-", {"segment_len": 8}, {"pipeline": 2}),
    "train.cuda_graphs=false": ("M", {"segment_len": 8, "cuda_graphs": True}, {}),
}


@pytest.mark.parametrize("fix", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_fix(recipe_of, fix):
    pattern, train, parallel = REFUSED[fix]
    given = recipe_of(pattern).model_dump(exclude_none=True)
    given["train"] |= train
    with pytest.raises(ConfigError, match=r"train\.segment_len \(") as refused:
        validate(Recipe, given | {"parallel": parallel}, "test")
    assert fix in str(refused.value)


def test_tensor_ranks_that_cannot_share_a_segment_are_refused(recipe_of):
    sizes = dict.fromkeys(DIMENSIONS, 1) | {"tensor": 2}
    with pytest.raises(ConfigError, match=r"train\.segment_len \(1\) must be a multiple of .* parallel\.tensor \(2\)"):
        check_fit(recipe_of("M", segment_len=1), sizes)


def _journey(folder: Path, data: str, recipes: dict[str, Recipe]) -> list[bool]:
    return [train(recipe, folder / name, data=data).finished for name, recipe in recipes.items()]


def test_two_processes_train_in_segments_as_one_does(recipe_of, data, tmp_path):
    """Packed documents, accumulation, held-out losses; float32, so sums differ by their order."""
    hybrid = recipe_of("1M*-", steps=2, micro_batch_size=2, eval_every=2, segment_len=8)
    one = hybrid.model_copy(update={"model": hybrid.model.model_copy(update={
        "attention": hybrid.model.attention.model_copy(update={"n_kv_heads": 2}), "vocab_size": 258})})
    meshes = {name: one.model_copy(update={"parallel": ParallelConfig(**parallel)}) for name, parallel in (
        ("shard", {"recompute": "full"}), ("tensor", {"tensor": 2, "recompute": "selective"}))}
    train(one, tmp_path / "one", data=data)
    assert run_ranks(2, _journey, tmp_path, data, meshes) == [[True] * len(meshes)] * 2
    expected, records = load_model(tmp_path / "one").state_dict(), Run(tmp_path / "one").metrics()
    for name in meshes:
        for mine, record in zip(Run(tmp_path / name).metrics(), records, strict=True):
            for key in {"loss", "grad_norm", "held_out_loss"} & set(record):
                assert mine[key] == pytest.approx(record[key], rel=2e-4), (name, key)
        for key, weight in load_model(tmp_path / name).state_dict().items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=2e-3, msg=f"{name}: {key}")


def test_a_stopped_run_goes_on_bit_for_bit_and_not_with_other_segments(recipe_of, data, tmp_path):
    recipe = recipe_of("1M*-", segment_len=8, steps=6)

    def stop(now: dict[str, Any]) -> None:
        if now["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(recipe, tmp_path / "stopped", data=data, progress=stop)
    assert not stopped.finished
    for other in (16, None):
        changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"segment_len": other})})
        with pytest.raises(CheckpointError, match=f"train.segment_len: 8 → {other}"):
            train(changed, stopped.path, data=data)
    train(recipe, stopped.path, data=data)
    whole = train(recipe, tmp_path / "whole", data=data)
    ours, theirs = (load_model(run).state_dict() for run in (stopped, whole))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert [r["loss"] for r in stopped.metrics()] == [r["loss"] for r in whole.metrics()]


def test_a_run_from_before_the_key_goes_on_without_it(recipe_of, data, tmp_path):
    recipe = recipe_of("M", steps=8)
    run = train(recipe_of("M", steps=8), tmp_path / "run", data=data, progress=_stop_early)
    (meta,) = run.checkpoints.glob("*/meta.json")
    saved = json.loads(meta.read_text())
    del saved["recipe"]["train"]["segment_len"]
    meta.write_text(json.dumps(saved))
    assert train(recipe, run.path, data=data).finished


def _stop_early(now: dict[str, Any]) -> None:
    if now["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("positions", "length"), [("rope", 8), ("none", None)])
def test_samples_of_evaluation_are_as_long_as_what_attention_learned(recipe_of, tmp_path, positions, length):
    recipe = recipe_of("M*", segment_len=8)
    rotary = {"positions": "rope", "rope_fraction": 1.0, "rope_base": 1e4} if positions == "rope" else {}
    attention = validate(AttentionConfig, recipe.model.attention.model_dump(exclude_none=True) | rotary, "test")
    run = Run(tmp_path / "run")
    run.write_recipe(recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": attention})}))
    assert Subject(run, EvalOptions(), ByteTokenizer()).limit.tokens == length


def test_the_key_is_part_of_the_recipe_that_a_run_keeps(recipe_of, tmp_path):
    recipe = recipe_of("M", segment_len=8)
    (tmp_path / "tiny.toml").write_text(to_toml(recipe))
    assert validate(Recipe, read_toml(tmp_path / "tiny.toml"), "tiny.toml").train.segment_len == 8
    assert (recipe.train.pass_len, recipe_of("M").train.pass_len) == (8, 32)
