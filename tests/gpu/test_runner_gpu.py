"""Passes over pools on a GPU: recorded steps, ragged passes and kernels that begin early, beside one plain forward."""

from __future__ import annotations

import copy

import pytest
import torch

from hinny import load_recipe
from hinny.infer.parts import Part
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import prepare
from hinny.infer.runner import ModelRunner
from hinny.model import Model

pytestmark = pytest.mark.gpu
LENGTHS = [1, 70, 129, 300, 33]
STEPS = 40


def model_of(name: str) -> Model:
    recipe = load_recipe(name, ["model.vocab_size=1024"])
    model = Model(recipe.model)
    model.init_weights(0)
    return model.cuda().requires_grad_(False)


@pytest.mark.parametrize("name", ["130m-hybrid", "130m-mamba2", "130m-transformer", "130m-mamba"])
@torch.no_grad()
def test_recorded_steps_behind_ragged_prompts_are_as_near_to_float32_as_a_plain_pass(name):
    exact = model_of(name)
    short = copy.deepcopy(exact)
    to_bfloat16(short)
    plain = copy.deepcopy(short)
    prepare(short)
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(1024, (length + STEPS,), generator=draw).tolist() for length in LENGTHS]
    pages = [list(range(i * 6, i * 6 + 6)) for i in range(len(texts))]
    runner = ModelRunner(short, slots=8, pages=32)
    for tensor in runner.pool.tensors():
        tensor.normal_()
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for i, length in enumerate(LENGTHS):
        runner.clear_slot(i)
        if length > 1:
            runner.run([Part(i, pages[i], 0, texts[i][:length // 2], wanted=0)])
    firsts = [Part(i, pages[i], length // 2, texts[i][length // 2:length]) for i, length in enumerate(LENGTHS)]
    for i, row in enumerate(runner.run(firsts).clone()):
        found[i].append(row)
    for step in range(STEPS - 1):
        parts = [Part(i, pages[i], length + step, [texts[i][length + step]]) for i, length in enumerate(LENGTHS)]
        for i, row in enumerate(runner.run(parts).clone()):
            found[i].append(row)
    for i, length in enumerate(LENGTHS):
        tokens = torch.tensor([texts[i][:-1]], device="cuda")
        wanted = exact(tokens)[0, length - 1:]
        near = (plain(tokens)[0, length - 1:].float() - wanted).norm() / wanted.norm()
        far = (torch.stack(found[i]).float() - wanted).norm() / wanted.norm()
        assert far < 1.5 * near + 1e-3, (name, i, float(far), float(near))
