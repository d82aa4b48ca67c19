"""transformers beside `hinny bench generate --recipe`: the same weights, checked before they are timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hinny.bench.evaluation import random_model
from hinny.bench.generation_peer import FIRST, Transformers, _only_known, _scan, _step
from hinny.config import load_recipe
from hinny.errors import BackendError
from hinny.model import Model
from hinny.ops.ssd import ssd_step

pytest.importorskip("transformers")

SMALL = ["model.vocab_size=64", "model.d_model=32"]
SIZES = {"tiny-hybrid": ["model.mamba2.head_dim=16", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
                         "model.attention.head_dim=16", "model.mlp.d_ff=48"],
         "tiny-mamba2": ["model.mamba2.head_dim=16"],
         "tiny-transformer": ["model.attention.n_heads=2", "model.attention.n_kv_heads=1",
                              "model.attention.head_dim=16", "model.mlp.d_ff=48"]}


class Plain:
    """The model itself, over whole prompts; `off` is added to what it says."""

    def __init__(self, model: Model, off: float = 0.0) -> None:
        self.model, self.off = model, off

    def logits(self, prompt: list[int]) -> Tensor:
        found = self.model(torch.tensor([prompt]))[0, -1]
        return found + self.off * found.norm()


def small(recipe: str, precision: str = "fp32") -> Model:
    return random_model(load_recipe(recipe, [*SMALL, *SIZES[recipe]]), torch.device("cpu"), precision)


@pytest.mark.parametrize("static", [False, True], ids=["default", "static"])
@pytest.mark.parametrize("recipe", SIZES)
def test_the_twin_says_the_same_and_writes_as_many_tokens_as_are_timed(
        recipe: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(recipe)
    peer = Transformers(model, static=static, at=None)
    peer.check(Plain(model))
    written = []
    once = peer._times
    monkeypatch.setattr(peer, "_times", lambda prompt, tokens: written.append((*prompt.shape, tokens)) or once(
        prompt, tokens))
    seconds = peer.decode(batch=2, context=8, tokens=3)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert written == [(2, 8, FIRST + 3)] * 2
    assert ("static cache" if static else "default cache") in peer.name


def test_a_twin_in_bfloat16_has_its_weights_in_it_and_is_close() -> None:
    model = small("tiny-hybrid", "bf16")
    peer = Transformers(model, static=False, at=None)
    peer.check(Plain(model))
    assert {p.dtype for p in peer._twin.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_a_twin_that_says_something_else_is_not_timed() -> None:
    model = small("tiny-transformer")
    with pytest.raises(BackendError, match="nothing was timed"):
        Transformers(model, static=False, at=None).check(Plain(model, off=0.01))


def test_the_peers_context_is_the_points_or_the_longest_that_it_may_read() -> None:
    model = small("tiny-transformer")
    assert [Transformers(model, static=False, at=at).context(4096) for at in (None, 512, 8192)] == [4096, 512, 4096]


class Step:
    """What `MambaSSM.ssd_update` does, by hinny's definition."""

    def __init__(self) -> None:
        self.calls = 0

    def ssd_update(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                   dt_bias: Tensor) -> Tensor:
        self.calls += 1
        y, after = ssd_step(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, initial_state=state)
        state.copy_(after)
        return y


@pytest.mark.parametrize("recipe", ["tiny-hybrid", "tiny-mamba2"])
def test_the_twin_writes_the_same_with_hinnys_scan_and_the_peers_step(
        recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(recipe)
    peer, step = Transformers(model, static=False, at=None), Step()
    prompt = peer._prompt(2, 70)

    def written() -> Tensor:
        found = peer._twin.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                    max_new_tokens=6, min_new_tokens=6, eos_token_id=None, pad_token_id=0,
                                    output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits)

    before = written()
    (module,) = {type(one).__module__ for one in peer._twin.modules() if type(one).__name__.endswith("Mamba2Mixer")}
    monkeypatch.setattr(f"{module}.mamba2_chunk_scan", _scan)
    monkeypatch.setattr(f"{module}.mamba2_selective_state_update", _step(step))
    torch.testing.assert_close(written(), before, rtol=1e-4, atol=1e-4)
    assert step.calls == 5 * model.config.pattern.count("M")


def test_options_that_a_kernel_does_not_know_are_left_out() -> None:
    assert _only_known(lambda a, *, b=1: (a, b))(2, b=3, position_ids=None) == (2, 3)
