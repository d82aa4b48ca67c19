"""On a GPU quantised weights give the numbers that they stand for, int4 in the GPU's own format too."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_model
from torch import nn

from hinny.errors import ConfigError
from hinny.infer.parts import Part
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import Several, prepare
from hinny.infer.quantise import is_quantised, quantise
from hinny.infer.runner import ModelRunner
from hinny.memory.quantised import matrix_bytes, quantised_bytes
from hinny.model import Model
from hinny.ops import thin_linear
from hinny.ops.kernels import thin

pytest.importorskip("torchao")
pytestmark = pytest.mark.gpu
TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(1))
WIDE = {"mlp": dict(d_ff=1024, activation="gelu"), "d_model": 512,
        "mamba2": dict(d_state=64, head_dim=64, n_groups=2, expand=2, d_conv=4, chunk_len=16),
        "attention": dict(n_heads=8, n_kv_heads=2, head_dim=64, positions="rope", rope_fraction=0.5,
                          rope_base=10000.0)}
NARROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def wide() -> Model:
    model = small_model("M-*-", init_std=0.05, **WIDE).float().cuda()
    to_bfloat16(model)
    return model


def meant(weight: torch.Tensor) -> torch.Tensor:
    """What a quantised weight stands for: of int4, what its product with the identity gives."""
    if hasattr(weight, "scale_and_zero"):
        eye = torch.eye(weight.shape[1], dtype=torch.bfloat16, device="cuda")
        return torch.nn.functional.linear(eye, weight).T.double()
    return weight.qdata.double() * weight.scale.double()


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@torch.no_grad()
def test_logits_are_those_of_the_numbers_that_the_short_ones_stand_for(kind):
    model = wide()
    before = copy.deepcopy(model)
    quantise(model, kind)
    exact = small_model("M-*-", init_std=0.05, **WIDE).cuda()
    for name, part in exact.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            weight = model.get_submodule(name).weight
            part.weight.copy_(meant(weight) if is_quantised(weight) else weight)
            if is_quantised(weight):
                old = before.get_submodule(name).weight.double()
                assert (part.weight - old).norm() < {"int8": 0.01, "fp8": 0.04, "int4": 0.15}[kind] * old.norm()
    wanted = exact(TOKENS.cuda())
    for _ in range(2):
        found = model(TOKENS.cuda()).double()
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        prepare(model)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_model_takes_the_memory_that_is_said(kind):
    model = wide()
    quantise(model, kind)
    held = 0
    for weight in model.parameters():
        if is_quantised(weight):
            parts = (weight.qdata, weight.scale_and_zero if kind == "int4" else weight.scale)
            held += sum(part.nbytes for part in parts)
            assert sum(part.nbytes for part in parts) == matrix_bytes(*weight.shape, kind)
        else:
            held += weight.nbytes
    assert quantised_bytes(model.config, kind, 2) == held


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("m", [1, 5])
@torch.no_grad()
def test_every_short_number_is_widened_to_itself(kind, m):
    numbers = torch.arange(256, device="cuda", dtype=torch.int32).to(torch.uint8).view(torch.int8)
    if kind == "fp8":
        numbers = numbers.masked_fill(numbers & 127 == 127, 0).view(torch.float8_e4m3fn)  # two of them are NaN
    # row i of 512 picks number i out of each of its halves
    weight = numbers.view(torch.int8).repeat(16, 2).view(NARROW[kind])
    scale = torch.linspace(0.5, 2, 16, device="cuda")
    for at in range(0, 512, m):
        x = torch.zeros(m, 512, dtype=torch.bfloat16, device="cuda")
        x[torch.arange(m), (at + torch.arange(m)) % 512] = 1
        assert thin.takes(x, weight, scale)
        y = thin_linear(x, weight, scale=scale, wide=True)
        assert torch.equal(y, x.float() @ weight.float().T * scale)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("m", [1, 2, 16, 17, 33, 64, 65])
@pytest.mark.parametrize(("n", "k"), [(18560, 4096), (4096, 8192), (48, 512)])
@torch.no_grad()
def test_a_product_with_short_numbers_is_as_exact_as_its_inputs(m, n, k, kind):
    random = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, k, generator=random, device="cuda").to(torch.bfloat16)
    weight = (torch.randn(n, k, generator=random, device="cuda") * 40).clamp(-128, 127).to(NARROW[kind])
    scale = torch.rand(n, generator=random, device="cuda") / 40 / k ** 0.5
    assert thin.takes(x, weight, scale) == (m <= thin.MOST_ROWS)
    for activation, act in ((None, lambda v: v), ("gelu", nn.functional.gelu), ("relu2", lambda v: v.relu().square())):
        y = thin_linear(x, weight, scale=scale, activation=activation).double()
        wanted = act(x.double() @ (weight.double() * scale.double()[:, None]).T)
        # of more rows the product, the scaled one and the activation's result are rounded, and a square doubles errors
        assert (y - wanted).norm() < (2.5e-3 if m <= thin.MOST_ROWS else 6e-3) * wanted.norm()


@pytest.mark.parametrize("kind", NARROW)
@torch.no_grad()
def test_recorded_steps_of_short_weights_are_those_of_plain_ones(kind):
    model = wide()
    quantise(model, kind)
    prepare(model)
    assert isinstance(model.blocks[0].layer.in_proj, Several)
    found = []
    for recorded in (True, False):
        runner = ModelRunner(model, slots=3, pages=6, recorded=recorded)
        steps = [[Part(slot, [slot], step, (5 * slot + step,), 1) for slot in range(3)] for step in range(6)]
        for slot in range(3):
            runner.clear_slot(slot)
        found.append(torch.stack([runner.run(step).clone() for step in steps]))
    # a graph may have more rows than there are sequences
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


def test_four_bits_need_whole_groups_in_bfloat16():
    with pytest.raises(ConfigError, match="int4 is made from bfloat16"):
        quantise(small_model("M-").float().cuda(), "int4")
    narrow = small_model("M-").float().cuda()  # of width 16
    to_bfloat16(narrow)
    with pytest.raises(ConfigError, match="no multiple"):
        quantise(narrow, "int4")
