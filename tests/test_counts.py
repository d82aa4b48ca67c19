"""Counts against the model built on meta, the states it makes, and the paper's arithmetic."""

from __future__ import annotations

import pytest
import torch
from small import PATTERNS, small_config

from hinny import counts
from hinny.config import ModelConfig, load_recipe
from hinny.errors import ConfigError
from hinny.model import Model

SWIGLU = {"mlp": {"d_ff": 24, "activation": "swiglu"}}
WIDE = {"mamba2": dict(d_state=8, head_dim=8, n_groups=5, n_heads=5, d_conv=4, chunk_len=4)}
"""Mamba-2 with 40 channels in a model 16 wide."""
VARIANTS = [(pattern, {}) for pattern in PATTERNS] + [
    ("M-M*-", WIDE), ("*-", SWIGLU), ("M-M*-", {"norm": "layernorm1p"}), ("1*M-", {"tie_embeddings": True})]


def on_meta(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config)


@pytest.mark.parametrize(("pattern", "changes"), VARIANTS)
def test_every_part_counts_the_parameters_that_the_model_has(pattern: str, changes: dict) -> None:
    config = small_config(pattern, **changes)
    model, count = on_meta(config), counts.parameters(config)
    assert count.embedding == model.embedding.weight.numel()
    assert count.head == (0 if config.tie_embeddings else model.head.weight.numel())
    norms = [*model.norm.parameters(), *(p for block in model.layers for p in block.norm.parameters())]
    assert count.norms == sum(p.numel() for p in norms)
    for symbol, number in count.layers.items():
        blocks = [block for block, kind in zip(model.layers, pattern, strict=True) if kind == symbol]
        assert number == sum(p.numel() for block in blocks for p in block.layer.parameters())
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.non_embedding == count.total - count.embedding - count.head


@pytest.mark.parametrize("symbol", "1M*-")
def test_products_are_the_weights_of_matrices_and_convolutions(symbol: str) -> None:
    config = small_config(symbol)
    layer = on_meta(config).layers[0].layer
    weights = [p.numel() for name, p in layer.named_parameters() if p.ndim == 2 and name != "A_log"]
    assert counts.layer(config, symbol).products == sum(weights)


@pytest.mark.parametrize(("recipe", "gigaflops"), [("8b-transformer", 48.2), ("8b-hybrid", 46.6), ("8b-mamba2", 44.3)])
def test_training_flops_of_the_8b_models_are_those_of_the_paper_within_one_percent(
        recipe: str, gigaflops: float) -> None:
    # by Megatron's formulas, which count the scan as 7 d_inner n
    assert counts.training_flops(load_recipe(recipe).model, 4096) == pytest.approx(gigaflops * 1e9, rel=0.01)


def test_the_hybrid_needs_0_70_of_the_transformers_flops_at_32k_and_0_40_at_128k() -> None:
    hybrid, transformer = (load_recipe(f"8b-{name}").model for name in ("hybrid", "transformer"))
    for length, share in ((32768, 0.70), (131072, 0.40)):
        found = counts.training_flops(hybrid, length) / counts.training_flops(transformer, length)
        assert found == pytest.approx(share, abs=0.01)


def test_decoding_a_sequence_token_by_token_counts_the_causal_pairs_of_the_forward_pass() -> None:
    config, length = small_config("*-*-"), 50
    attention = config.attention
    assert attention is not None
    decoded = sum(counts.decode_flops(config, context) for context in range(1, length + 1))
    diagonal = 2 * 2 * attention.n_heads * attention.head_dim * length
    assert decoded == counts.forward_flops(config, length) * length + diagonal


def test_ssd_flops_are_those_of_its_products_counted_pair_by_pair() -> None:
    config, length = small_config("M"), 4 * 64
    config = config.model_copy(update={"mamba2": config.mamba2.model_copy(update={"chunk_len": 64})})
    c = config.mamba2
    heads, total = c.expand * config.d_model // c.head_dim, 0
    for t in range(length):
        within = t % c.chunk_len + 1
        total += c.n_groups * within * 2 * c.d_state       # C_t . B_s in its chunk, per group
        total += heads * within * 2 * c.head_dim           # times x_s
        total += 2 * heads * 2 * c.head_dim * c.d_state    # into the chunk's state, and out of the incoming one
    found = length * counts.layer(config, "M").mixing(length)
    assert found == pytest.approx(total, rel=1 / c.chunk_len)
    assert found <= total


def test_a_chunk_is_no_longer_than_the_sequence() -> None:
    config = small_config("M")
    long = config.model_copy(update={"mamba2": config.mamba2.model_copy(update={"chunk_len": 10**6})})
    exact = config.model_copy(update={"mamba2": config.mamba2.model_copy(update={"chunk_len": 7})})
    assert counts.forward_flops(long, 7) == counts.forward_flops(exact, 7)


def test_training_counts_three_forward_passes() -> None:
    config = small_config("1*M-")
    assert counts.training_flops(config, 33) == 3 * counts.forward_flops(config, 33)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_state_and_cache_bytes_are_those_of_the_state_that_the_model_makes(pattern: str, tokens: int) -> None:
    config = small_config(pattern)
    model = Model(config)
    model.init_weights(0)
    state = model.init_state(3)
    if tokens:
        with torch.no_grad():
            model(torch.ones(3, tokens, dtype=torch.int64), state)
    expected = counts.state_bytes(config) + tokens * counts.kv_bytes_per_token(config, dtype_bytes=4)
    assert state.bytes() == 3 * expected


def test_decoding_reads_all_weights_but_an_untied_embedding() -> None:
    config = load_recipe("8b-hybrid").model
    matrix = config.vocab_size * config.d_model
    assert counts.decode_weight_bytes(config) == counts.weight_bytes(config) - 2 * matrix
    tied = config.model_copy(update={"tie_embeddings": True})
    assert counts.decode_weight_bytes(tied) == counts.weight_bytes(tied)


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="length is 0"):
        counts.forward_flops(small_config("M"), 0)


def test_counts_are_whole_numbers() -> None:
    for name in ("8b-hybrid", "8b-mamba"):
        model = load_recipe(name).model
        for value in (counts.parameters(model).total, counts.forward_flops(model, 4097), counts.state_bytes(model)):
            assert type(value) is int
