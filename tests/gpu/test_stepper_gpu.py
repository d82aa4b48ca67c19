"""Rows of unequal length on a GPU: attention without a mask, and decoding as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("pydantic", reason="hinny.model reads recipes")

from small import PATTERNS, SECTIONS, small_config

from hinny.infer.reading.fixed import UNRECORDED, FixedBatch
from hinny.infer.reading.stepper import Stepper
from hinny.model import Model
from hinny.ops import attention, attention_reference
from hinny.ops.attention import _knows_used_keys
from hinny.state import State, join

pytestmark = pytest.mark.gpu
WORDS = 50
SIZES = {"mamba1": SECTIONS["1"]["mamba1"] | {"d_state": 16, "dt_rank": 8},
         "mamba2": SECTIONS["M"]["mamba2"] | {"d_state": 64, "head_dim": 32, "chunk_len": 64},
         "attention": SECTIONS["*"]["attention"] | {"head_dim": 32}, "mlp": SECTIONS["-"]["mlp"] | {"d_ff": 256}}
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Of the largest number: float32 sums in another order, and bfloat16's 8 bits over five layers and many steps."""


@pytest.fixture(autouse=True)
def _as_in_use() -> Iterator[None]:
    """Graphs are recorded with PyTorch's usual ops, not with its deterministic ones."""
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def gpu_model(pattern: str, dtype: torch.dtype) -> Model:
    sections = {name: size for symbol, name in (("1", "mamba1"), ("M", "mamba2"), ("*", "attention"), ("-", "mlp"))
                for size in [SIZES[name]] if symbol in pattern}
    model = Model(small_config(pattern, d_model=128, vocab_size=64, init_std=0.1, **sections))
    model.init_weights(0)
    return model.to("cuda", dtype)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def prompted(model: Model, lengths: tuple[int, ...]) -> State:
    states = []
    for n in lengths:
        states.append(model.init_state(1))
        model(drawn(1, n, seed=n), states[-1])
    return join(states)


def batch(model: Model, lengths: tuple[int, ...], recorded: bool) -> FixedBatch:
    return FixedBatch(model, prompted(model, lengths), model.output_weight[:WORDS], 0, recorded=recorded)


def assert_states_near(found: State, expected: State, share: float) -> None:
    assert torch.equal(found.positions, expected.positions)
    for a, b in zip(found.layers, expected.layers, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        for name, mine in a.tensors().items():
            theirs = b.tensors()[name]
            for row, n in enumerate(found.positions.tolist()):
                x, y = (t[row, :n] if name in "kv" else t[row] for t in (mine, theirs))
                assert (x.float() - y.float()).abs().max() <= share * y.float().abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "groups", "p"), [(8, 2, 64), (4, 4, 128), (6, 1, 32), (4, 2, 20)])
@pytest.mark.parametrize("t", [1, 5, 130])
def test_attention_of_rows_of_unequal_length_equals_the_definition(
    dtype: torch.dtype, heads: int, groups: int, p: int, t: int,
) -> None:
    lengths = torch.tensor([t, t + 1, 300, 517, 700], device="cuda")
    q = torch.randn(5, t, heads, p, device="cuda").to(dtype)
    # as a state holds them: part of a buffer with room for more, the rest of which means nothing
    k, v = (torch.randn(5, 900, groups, p, device="cuda").to(dtype)[:, :700] for _ in range(2))
    found, expected = (run(*(x.to(to) for x in (q, k, v)), lengths=lengths)
                       for run, to in ((attention, dtype), (attention_reference, torch.float64)))
    assert found.dtype == dtype
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
    assert (found.double() - expected).abs().max() < limit


@pytest.mark.parametrize("t", [1, 300])
def test_neither_equal_nor_unequal_rows_make_a_mask_or_copy_the_keys(t: int) -> None:
    q = torch.randn(4, t, 8, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(4, 70000, 2, 64, device="cuda", dtype=torch.bfloat16)[:, :65536] for _ in range(2))
    lengths = torch.tensor([65536, 300, 1000, 4000], device="cuda")
    # rows of unequal length need a mask where this PyTorch cannot be told how many keys are in use
    for given in (None, lengths) if _knows_used_keys() else (None,):
        attention(q, k, v, lengths=given)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, lengths=given)
        # the output, some numbers a row, and what the parts of its keys give: a mask of the equal rows alone has
        # 19.7 MB for 300 queries, the keys have 67 MB
        assert torch.cuda.max_memory_allocated() - before < 16 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_recorded_step_is_the_step(pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through warm-up, recording, rows that leave, a new order, smaller buffers and larger ones."""
    monkeypatch.setattr("hinny.infer.reading.fixed.GROWTH", (1, 8))
    model, lengths = gpu_model(pattern, dtype), (5, 40, 1, 130, 17)
    one, two = (batch(model, lengths, recorded) for recorded in (True, False))
    tokens = drawn(5)
    for rows, steps in (([0, 1, 2, 3, 4], 6), ([3, 0, 1, 4], 5), ([2, 0], 5), ([1, 0], 70)):
        for each in (one, two):
            each.keep(torch.tensor(rows))
        tokens = tokens[rows]
        for step in range(steps):
            found, expected = (each.step(tokens) for each in (one, two))
            assert torch.equal(found, expected), (rows, step)
            tokens = found
        assert_states_near(one.state, two.state, NEAR[dtype])
    assert one._graph._graph is not None
    assert one.state.positions.tolist() == [130 + 86, 40 + 86]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_in_a_graph_goes_as_each_row_alone_without(pattern: str, dtype: torch.dtype) -> None:
    model, lengths = gpu_model(pattern, dtype), (5, 40, 1, 130)
    together = Stepper(model, prompted(model, lengths), WORDS, room=20)
    alone = [prompted(model, (n,)) for n in lengths]
    agreed = 0
    for step in range(20):
        tokens = drawn(4, seed=step)
        found = together.step(tokens)
        for row, state in enumerate(alone):
            hidden = model.hidden(tokens[row].view(1, 1), state)[0, -1]
            agreed += int(found[row] == (model.output_weight[:WORDS] @ hidden).argmax())
    assert_states_near(together.state, join(alone), NEAR[dtype])
    # where two words are nearly as likely, bfloat16 may take either
    assert agreed == 80 or (dtype == torch.bfloat16 and agreed > 68)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_recorded_step_waits_for_nothing(pattern: str) -> None:
    model = gpu_model(pattern, torch.bfloat16)
    stepper = Stepper(model, prompted(model, (5, 40, 1)), WORDS, room=50)
    stepper.keep(torch.tensor([2, 0]))
    tokens = drawn(2)
    for _ in range(UNRECORDED + 2):
        tokens = stepper.step(tokens)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(5):
            tokens = stepper.step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == stepper._fixed._buffers.next[stepper._fixed._slots].tolist()  # type: ignore[union-attr]


def test_under_autocast_a_graph_casts_the_weights_itself() -> None:
    model = gpu_model("M-M*-", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        one, two = (batch(model, (5, 40, 1), recorded) for recorded in (True, False))
    tokens = drawn(3)
    for _ in range(UNRECORDED + 6):
        # weights cast in here are freed at its end
        with torch.autocast("cuda", torch.bfloat16):
            found, expected = (each.step(tokens) for each in (one, two))
        rubbish = torch.full((1 << 20,), torch.nan, device="cuda")
        del rubbish
        assert torch.equal(found, expected)
        tokens = found
    assert_states_near(one.state, two.state, NEAR[torch.bfloat16])


def test_a_stepper_gives_its_memory_back() -> None:
    model = gpu_model("M-M*-", torch.bfloat16)

    def decode() -> int:
        stepper = Stepper(model, prompted(model, (5, 40)), WORDS, room=100)
        tokens = drawn(2)
        for _ in range(UNRECORDED + 6):
            tokens = stepper.step(tokens)
        del stepper
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    decode()
    held = decode()
    assert decode() == held
