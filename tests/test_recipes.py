"""Every shipped recipe: it loads, its counts are the model's, and it is what its family says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hinny
from hinny import counts, memory
from hinny.config import ParallelConfig, Recipe, find, load_recipe, read_toml, shipped_names, to_toml, validate
from hinny.model import Model

NAMES = shipped_names("recipes")
FAMILIES = ("mamba", "mamba2", "transformer", "hybrid")
LONG = ("hybrid-16k", "hybrid-32k", "hybrid-128k", "transformer-16k", "transformer-32k")
PARAMETERS_8B = {"mamba2": 8_236_999_680, "hybrid": 8_654_517_248, "transformer": 8_540_135_424,
                 "mamba": 8_148_783_104}


def test_every_size_has_the_four_families() -> None:
    sizes = ("tiny", "30m", "50m", "130m", "840m", "8b")
    assert {f"{size}-{family}" for size in sizes for family in FAMILIES} <= set(NAMES)


def test_the_8b_models_are_extended_to_the_papers_lengths_under_names_of_their_own() -> None:
    assert [name for name in NAMES if "/" in name] == sorted(f"long/8b-{model}" for model in LONG)
    assert len({load_recipe(name).name for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_model_built_on_meta(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = Model(recipe.model)
    assert counts.parameters(recipe.model).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_called_as_its_file_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == Path(name).name
    assert len(recipe.description) > 40
    assert "name" not in read_toml(find("recipes", name))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_writing_and_reading(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert validate(Recipe, read_toml(path), "again") == recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_the_8b_models_have_exactly_the_parameters_of_the_release(family: str) -> None:
    count = counts.parameters(load_recipe(f"8b-{family}").model)
    assert count.total == PARAMETERS_8B[family]
    assert count.embedding == count.head == 256_000 * 4096


def test_the_8b_models_differ_in_activation_norm_positions_and_groups_as_released() -> None:
    hybrid, transformer = (load_recipe(f"8b-{family}").model for family in ("hybrid", "transformer"))
    assert (hybrid.mlp.activation, transformer.mlp.activation) == ("gelu", "relu2")
    assert (hybrid.norm, transformer.norm) == ("rmsnorm", "layernorm1p")
    assert (hybrid.attention.positions, transformer.attention.positions) == ("none", "rope")
    assert (transformer.attention.rope_dim, transformer.attention.rope_base) == (64, 10000.0)
    assert (hybrid.attention.n_kv_heads, transformer.attention.n_kv_heads) == (8, 32)
    assert (hybrid.mamba2.n_groups, hybrid.mamba2.d_state, hybrid.mamba2.chunk_len) == (8, 128, 128)
    assert hybrid.pattern == "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    assert transformer.pattern == "*-" * 32


def test_the_transformers_output_layers_start_smaller_by_the_released_rule() -> None:
    for size in ("tiny", "50m", "130m", "840m", "8b"):
        model = load_recipe(f"{size}-transformer").model
        blocks = model.depth // 2
        assert model.output_init_std == pytest.approx(model.init_std / (2 * blocks) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(("family", "tokens"), [("hybrid", 3.5e12), ("mamba2", 3.5e12), ("transformer", 3.5e12),
                                                ("mamba", 1.1e12)])
def test_the_8b_runs_are_as_long_as_the_papers_to_a_step(family: str, tokens: float) -> None:
    recipe = load_recipe(f"8b-{family}")
    step = recipe.train.batch_size * recipe.train.seq_len
    assert abs(recipe.train.steps * step - tokens) <= step / 2
    assert recipe.optim.warmup_samples == 122_000
    assert recipe.optim.min_lr == pytest.approx(recipe.optim.lr / 10)
    assert (recipe.train.batch_size, recipe.optim.lr) == ((256, 1e-4) if family == "mamba" else (1024, 3e-4))
    assert recipe.data.boundaries == "leak"


@pytest.mark.parametrize(("size", "tolerance"), [("tiny", 0.02), ("30m", 0.02), ("50m", 0.02), ("130m", 0.02),
                                                ("840m", 0.02)])
def test_the_families_of_a_size_match_in_non_embedding_parameters(size: str, tolerance: float) -> None:
    sizes = [counts.parameters(load_recipe(f"{size}-{family}").model).non_embedding for family in FAMILIES]
    assert max(sizes) / min(sizes) - 1 <= tolerance


@pytest.mark.parametrize("size", ["tiny", "30m", "50m", "130m", "840m"])
def test_the_families_of_a_size_train_alike(size: str) -> None:
    first, *others = (load_recipe(f"{size}-{family}") for family in FAMILIES)
    for other in others:
        assert (other.data, other.optim, other.train) == (first.data, first.optim, first.train)
        assert (other.model.vocab_size, other.model.tie_embeddings) == (
            first.model.vocab_size, first.model.tie_embeddings)


def test_the_840m_hybrid_is_the_released_example() -> None:
    count = counts.parameters(load_recipe("840m-hybrid").model)
    assert (count.non_embedding, count.total) == (382_839_680, 907_127_680)


def test_recipes_load_by_name_from_the_package() -> None:
    assert hinny.load_recipe("tiny-hybrid").model.pattern.count("*") >= 1


@pytest.mark.parametrize("family", ["mamba2", "transformer"])
def test_the_runs_on_fewer_tokens_are_those_of_the_paper(family: str) -> None:
    """The same model and settings as 8b-mamba's training, which the paper ran on 1.1T tokens alone."""
    ours, longer, mamba = (load_recipe(name) for name in (f"8b-{family}-1100b", f"8b-{family}", "8b-mamba"))
    assert ours.model == longer.model
    assert (ours.optim, ours.train, ours.data) == (mamba.optim, mamba.train, mamba.data)
    assert ours.train.steps * ours.train.batch_size * ours.train.seq_len == pytest.approx(1.1e12, rel=1e-6)
    assert longer.train.steps * longer.train.batch_size * longer.train.seq_len == pytest.approx(3.5e12, rel=1e-6)


@pytest.mark.parametrize("model", LONG)
def test_an_extension_goes_on_from_its_base_as_in_the_paper(model: str) -> None:
    """50B tokens at a tenth of the learning rate, in batches of as many tokens, warmed up over as many."""
    family, length = model.split("-")
    ours, base = load_recipe(f"long/8b-{model}"), load_recipe(f"8b-{family}")
    assert ours.train.seq_len == {"16k": 16_384, "32k": 32_768, "128k": 131_072}[length]
    assert counts.parameters(ours.model).total == PARAMETERS_8B[family]
    rope = {"rope_base": 500_000.0} if family == "transformer" else {}
    attention = base.model.attention.model_copy(update=rope)
    assert ours.model == base.model.model_copy(update={"attention": attention})
    tokens = ours.train.batch_size * ours.train.seq_len
    assert tokens == base.train.batch_size * base.train.seq_len
    assert abs(ours.train.steps * tokens - 50e9) <= tokens / 2
    assert (ours.optim.lr, ours.optim.min_lr, ours.optim.schedule) == (3e-5, 3e-6, "cosine")
    assert ours.optim.lr == pytest.approx(base.optim.lr / 10)
    warm = base.optim.warmup_samples * base.train.seq_len
    assert 0 <= warm - ours.optim.warmup_samples * ours.train.seq_len < ours.train.seq_len
    assert ours.optim == base.optim.model_copy(update={
        "lr": 3e-5, "min_lr": 3e-6, "warmup_samples": ours.optim.warmup_samples})
    assert ours.data.boundaries == "leak"
    # the run to go on from is named on the command line
    assert ours.init is not None
    assert ours.init.source is None
    assert load_recipe(f"long/8b-{model}", ["init.from=RUN"]).init.source == "RUN"


@pytest.mark.parametrize("model", LONG)
def test_an_extension_fits_on_the_gpus_that_it_is_for(model: str) -> None:
    """8 of 80 GB, and as many as have a sequence each or a part of one; not without its [parallel]."""
    recipe = load_recipe(f"long/8b-{model}")
    usable = int(0.9 * 80e9)
    for devices in (8, 64, recipe.parallel.context * recipe.train.batch_size):
        assert memory.training(recipe, usable, devices)["fits"]
    plain = recipe.model_copy(update={"parallel": ParallelConfig()})
    assert not memory.training(plain, usable, 8)["fits"]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("8b-", "840m-", "130m-"))])
def test_a_recipe_fits_on_the_gpus_that_it_is_for(name: str) -> None:
    """8B over 16 of 80 GB, the smaller ones on one."""
    recipe = load_recipe(name)
    devices = 16 if name.startswith("8b-") else 1
    assert memory.training(recipe, int(0.9 * 80e9), devices)["fits"]
    assert recipe.train.batch_size % (recipe.train.micro_batch_size * devices) == 0
    assert recipe.train.cuda_graphs == (devices == 1)


def test_the_hybrid_with_rotary_positions_differs_in_them_alone() -> None:
    """What the paper's claim on RoPE in hybrids is tested with."""
    bare, rope = (load_recipe(name) for name in ("30m-hybrid", "30m-hybrid-rope"))
    assert rope.model.attention.positions == "rope"
    plain = rope.model.attention.model_copy(update={"positions": "none", "rope_fraction": None, "rope_base": None})
    assert bare.model == rope.model.model_copy(update={"attention": plain})
    assert (bare.optim, bare.train, bare.data) == (rope.optim, rope.train, rope.data)
