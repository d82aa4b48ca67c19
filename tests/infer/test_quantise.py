"""Quantised weights are the numbers that they stand for, close to what they were, and as small as is said."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small import small_config, small_model
from torch import nn

from hinny.errors import BackendError, ConfigError
from hinny.infer.engine import Engine
from hinny.infer.head import logits
from hinny.infer.precision import to_bfloat16
from hinny.infer.prepare import Packed, Product, Several, prepare
from hinny.infer.quantise import is_quantised, quantise, to_precision
from hinny.infer.request import Request
from hinny.infer.sums import Sums
from hinny.infer.tensor import Head, tensor_parallel
from hinny.memory.quantised import GROUP, matrix_bytes, quantised_bytes
from hinny.model import Model

pytest.importorskip("torchao")
PATTERNS = ["M-*-", "1*-"]
TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(1))


def meant(weight: torch.Tensor) -> torch.Tensor:
    """What a quantised weight stands for, by hand, in float64."""
    return weight.qdata.double() * weight.scale.double()


def short(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)
            and is_quantised(part.weight)}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_logits_are_those_of_the_numbers_that_the_short_ones_stand_for(pattern, kind):
    model = small_model(pattern).float()
    exact = small_model(pattern)
    quantise(model, kind)
    for name, part in short(model).items():
        exact.get_submodule(name).weight.copy_(meant(part.weight))
    wanted = exact(TOKENS)
    torch.testing.assert_close(model(TOKENS).double(), wanted, rtol=2e-5, atol=2e-5)
    prepare(model)
    torch.testing.assert_close(model(TOKENS).double(), wanted, rtol=2e-5, atol=2e-5)
    assert (small_model(pattern)(TOKENS) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_prepared_model_multiplies_by_the_short_numbers_themselves(kind):
    model = small_model("M1*-").float()
    quantise(model, kind)
    weights = {name: (part.weight.qdata.clone(), part.weight.scale.clone()) for name, part in short(model).items()}
    prepare(model)
    narrow = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    mamba2, mamba1, attention, mlp = (block.layer for block in model.blocks)
    assert isinstance(mamba2.in_proj, Several)
    assert [(type(part), part.weight.dtype, len(part.sizes)) for part in mamba2.in_proj.products] == [
        (Packed, narrow, 4), (Packed, torch.float32, 1)]
    assert isinstance(mamba1.in_proj, Packed)
    assert mamba1.dt_proj.weight.dtype == torch.float32
    for product in (mamba1.in_proj, mamba2.out_proj, attention.o, mlp.up, mlp.down):
        assert product.weight.dtype == narrow
        assert product.scale.dtype == torch.float32
    assert isinstance(mlp.up, Product)
    # the layers' own parameters are views of what is multiplied: nothing is there twice
    packed = attention.projected.__self__
    for part, own in zip("qkv", packed.weight.split(packed.sizes), strict=True):
        weight = attention.get_submodule(part).weight
        assert weight.qdata.data_ptr() == own.data_ptr()
        data, scale = weights[f"layers.2.layer.{part}"]
        assert torch.equal(weight.qdata.float(), data.float())
        assert torch.equal(weight.scale, scale)


@torch.no_grad()
def test_an_error_of_int8_is_at_most_half_a_step_of_its_row():
    model = small_model("M-*-").float()
    before = copy.deepcopy(model)
    quantise(model, "int8")
    assert short(model)
    for name, part in short(model).items():
        weight = before.get_submodule(name).weight.double()
        step = weight.abs().amax(1, keepdim=True) / 127.5
        # the largest value itself is cut to 127 steps
        assert ((meant(part.weight) - weight).abs() <= step * 0.5001).all()


@torch.no_grad()
def test_an_error_of_fp8_is_at_most_a_sixteenth_of_the_value():
    model = small_model("M-*-").float()
    before = copy.deepcopy(model)
    quantise(model, "fp8")
    for name, part in short(model).items():
        weight = before.get_submodule(name).weight.double()
        smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-9
        assert ((meant(part.weight) - weight).abs() <= weight.abs() / 15.99 + smallest).all()


def test_what_makes_time_steps_stays_and_the_rest_does_not():
    model = small_model("M1-*").float()
    quantise(model, "int8")
    parts = set(short(model))
    assert parts == {*(f"layers.0.layer.in_proj.{part}" for part in "zxBC"), "layers.0.layer.out_proj",
                     "layers.1.layer.in_proj.x", "layers.1.layer.in_proj.z", "layers.1.layer.out_proj",
                     "layers.2.layer.up", "layers.2.layer.down", *(f"layers.3.layer.{part}" for part in "qkvo")}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("tied", "width"), [(False, 4), (True, 4), (True, 2)])
def test_a_model_is_as_small_as_is_said(kind, tied, width):
    config = small_config("M1*-", tie_embeddings=tied)
    model = Model(config)
    model.init_weights(0)
    if width == 2:
        to_bfloat16(model)
    quantise(model, kind)
    held = sum(weight.qdata.nbytes + weight.scale.nbytes if is_quantised(weight) else weight.nbytes
               for weight in model.parameters())
    assert quantised_bytes(config, kind, width) == held


def test_four_bits_are_counted_with_what_fills_the_tiles():
    assert matrix_bytes(6, 1000, "int4") == 8 * 1024 // 2 + 8 * 1024 // GROUP * 4


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@torch.no_grad()
def test_a_model_in_bfloat16_decodes_in_short_numbers(kind):
    model = small_model("M-*-").float()
    to_bfloat16(model)
    quantise(model, kind)
    exact = small_model("M-*-")
    for name, part in exact.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            weight = model.get_submodule(name).weight
            part.weight.copy_(meant(weight) if is_quantised(weight) else weight)
    state = model.init_state(2)
    found = torch.cat([model(token, state) for token in TOKENS.split(1, 1)], 1).double()
    wanted = exact(TOKENS)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_what_cannot_be_is_refused_and_nothing_is_changed():
    model = small_model("M-")
    with pytest.raises(ConfigError, match=r"int2.*allowed: int8, fp8, int4"):
        quantise(model, "int2")
    with pytest.raises(ConfigError, match=r"layers.0.in_proj.z is torch.float64"):
        quantise(model, "int8")
    with pytest.raises(BackendError, match="int4 needs a GPU"):
        quantise(model.float(), "int4")
    assert not short(model)
    quantise(model, "int8")
    with pytest.raises(ConfigError, match="Int8Tensor already"):
        quantise(model, "int8")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_engine_serves_short_weights(trained_run, kind):
    engine, whole = Engine(trained_run.path, dtype=kind), Engine(trained_run.path, dtype="bf16")
    whole_ones = {name for name, part in engine.model.named_modules() if isinstance(part, nn.Linear)} - {
        *short(engine.model)}
    assert {name.rpartition(".")[2] for name in whole_ones} <= {"dt", "head"}
    tokens = torch.arange(40)[None] % 200
    got, true = (one.logits(tokens).float().log_softmax(-1) for one in (engine, whole))
    assert 0 < (got - true).abs().max() < 0.2
    # through the runner's pools, with the products packed
    ((answer,),) = engine.complete([Request(tuple(range(20, 40)), 8, ignore_eod=True)])
    written = [choice.token for choice in answer.choices]
    rows = engine.logits(torch.tensor([[*range(20, 40), *written]]))[0, 19:-1, :engine.tokenizer.vocab_size].float()
    # a pass over all tokens rounds in other places than one over single ones
    chosen = rows.gather(1, torch.tensor(written)[:, None])[:, 0]
    assert (rows.max(-1).values - chosen < 0.05).all()


def _cut() -> tuple[float, set[torch.dtype]]:
    """How far a rank's logits with int8 are from one process's with bfloat16, and what its products are of."""
    sums = Sums(dist.group.WORLD, torch.device("cpu"))
    whole, part = (small_model("M-*-", vocab_size=36).float() for _ in range(2))
    tensor_parallel(part, sums)
    tokens = torch.arange(36)[None]
    with torch.no_grad():
        to_precision(part, "int8")
        to_precision(whole, "bf16")
        prepare(part)
        wanted = logits(whole.hidden(tokens)[0], whole.output_weight)
        found = Head(part, len(whole.output_weight), sums)(part.hidden(tokens)[0])
    return ((found - wanted).norm() / wanted.norm()).item(), {
        module.weight.dtype for module in part.modules() if isinstance(module, Packed | Product)}


def test_ranks_that_share_a_model_quantise_their_parts():
    for gap, types in run_ranks(2, _cut):
        assert 0 < gap < 0.03
        assert types == {torch.int8, torch.bfloat16}


def test_a_missing_torchao_is_told_before_a_model_is_read(monkeypatch, tmp_path):
    _without_torchao(monkeypatch)
    with pytest.raises(BackendError, match=r"pip install 'hinny\[quantise\]'"):
        Engine(tmp_path, dtype="int8")


def test_without_torchao_the_extra_is_named(monkeypatch):
    _without_torchao(monkeypatch)
    with pytest.raises(BackendError, match=r"extra 'quantise'"):
        quantise(small_model("M").float(), "int8")


def _without_torchao(monkeypatch):
    real = importlib.import_module

    def missing(name: str, *rest: object):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
