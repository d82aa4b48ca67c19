"""Recipes: what cannot work or could not take effect is refused with the key, the value and the fix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hinny.config import (
    DataConfig,
    Mamba2Config,
    ModelConfig,
    OptimConfig,
    Recipe,
    SyntheticConfig,
    TrainConfig,
    apply_override,
    find,
    known_keys,
    load_recipe,
    read_toml,
    shipped_names,
    to_toml,
    validate,
)
from hinny.errors import ConfigError


@pytest.fixture
def data() -> dict[str, Any]:
    """A hybrid's recipe as plain tables, free to be spoilt; its sizes are this test's own."""
    table = {"name": "mine", **copy.deepcopy(read_toml(find("recipes", "tiny-hybrid")))}
    for key, value in {"model.n_layers": 12, "model.attention_ratio": 0.08, "model.mlp_ratio": 0.5, "model.d_model": 96,
                       "model.mamba2.head_dim": 32, "model.attention.n_heads": 3, "model.attention.n_kv_heads": 1,
                       "optim.lr": 2e-3, "optim.min_lr": 2e-4, "train.batch_size": 16,
                       "train.micro_batch_size": 16, "train.steps": 600, "train.save_every": 200}.items():
        change(table, key, value)
    return table


def change(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`data` with the dotted `key` set, or removed where value is None."""
    *parents, last = key.split(".")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
    if value is None:
        del table[last]
    else:
        table[last] = value
    return data


def refused(data: dict[str, Any]) -> str:
    """The message with which the recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, data, "mine.toml")
    message = str(caught.value)
    assert message.startswith("mine.toml: ")
    return message


@pytest.mark.parametrize(("key", "near"), [
    ("train.step", "train.steps"), ("optim.wieght_decay", "optim.weight_decay"),
    ("model.d_modle", "model.d_model"), ("model.mamba2.headdim", "model.mamba2.head_dim"),
    ("model.attention.n_kv_head", "model.attention.n_kv_heads"), ("data.synthetic.shares", "data.synthetic.share"),
    ("optimm", "optim"),
])
def test_a_misspelt_key_is_refused_with_the_nearest_known_one(data: dict, key: str, near: str) -> None:
    message = refused(change(data, key, 1))
    assert f"unknown key {key}. Did you mean {near}?" in message


def test_a_key_like_no_other_is_refused_with_the_known_ones(data: dict) -> None:
    message = refused(change(data, "train.zzzzqqqq", 1))
    assert "unknown key train.zzzzqqqq. Known keys here: train.seq_len, train.batch_size" in message


@pytest.mark.parametrize("key", ["model.d_model", "optim.lr", "train.seed", "data.boundaries", "model.mamba2.d_state",
                                 "description", "train"])
def test_what_must_be_chosen_has_no_default(data: dict, key: str) -> None:
    assert f"{key} is missing; it has no default." in refused(change(data, key, None))


@pytest.mark.parametrize(("key", "value", "parts"), [
    ("model.mamba2.head_dim", 36, ["mamba2.head_dim (36) must divide d_inner = expand * d_model = 192"]),
    ("model.mamba2.n_groups", 4, ["mamba2.n_groups (4) must divide the number of heads", "= 6"]),
    ("model.attention.n_kv_heads", 2, ["model.attention: n_kv_heads (2) must divide n_heads (3)"]),
    ("train.micro_batch_size", 3, ["train: micro_batch_size (3) must divide batch_size (16)"]),
    ("train.keep_every", 300, ["keep_every (300) must be a multiple of save_every (200) and at most steps (600)"]),
    ("train.keep_every", 800, ["keep_every (800) must be a multiple of save_every (200) and at most steps (600)"]),
    ("train.log_seconds", 0.0, ["train.log_seconds is 0.0", "greater than 0"]),
    ("train.loggers", ["wandb", "wandb"], ["train: loggers (wandb, wandb) names one twice"]),
    ("train.loggers", ["mlflow"], ["train.loggers.0 is 'mlflow'", "tensorboard", "wandb"]),
    ("optim.z_loss", 0.0, ["optim.z_loss is 0.0", "greater than 0"]),
    ("model.d_model", 0, ["model.d_model is 0", "greater than 0"]),
    ("model.d_model", -8, ["model.d_model is -8"]),
    ("model.d_model", 96.5, ["model.d_model is 96.5", "integer"]),
    ("model.d_model", "96", ["model.d_model is '96'", "integer"]),
    ("model.d_model", True, ["model.d_model is True", "integer"]),
    ("model.norm", "batchnorm", ["model.norm is 'batchnorm'", "rmsnorm", "layernorm1p"]),
    ("model.mlp.activation", "relu", ["model.mlp.activation is 'relu'", "gelu", "relu2", "swiglu"]),
    ("model.pattern", 5, ["model.pattern"]),
    ("model.pattern", ["M"], ["model.pattern"]),
    ("model.n_layers", 0, ["model.n_layers is 0; it must be positive"]),
    ("model.n_layers", "12", ["model.n_layers is '12'"]),
    ("model.attention_ratio", 0.9, ["attention_ratio (0.9) + model.mlp_ratio (0.5) is more than 1"]),
    ("model.mamba2.dt_min", 0.2, ["model.mamba2: dt_min (0.2) must be below dt_max (0.1)"]),
    ("optim.lr", float("inf"), ["optim.lr is inf"]),
    ("optim.lr", float("nan"), ["optim.lr is nan"]),
    ("optim.lr", 0, ["optim.lr is 0"]),
    ("optim.beta2", 1.0, ["optim.beta2 is 1.0", "less than 1"]),
    ("optim.min_lr", 0.1, ["optim: min_lr (0.1) must not exceed lr (0.002)"]),
    ("data.synthetic.share", 0.0, ["data.synthetic.share is 0.0"]),
    ("data.synthetic.share", 1.5, ["data.synthetic.share is 1.5"]),
    ("data.synthetic.tasks", {"phonebok": 1.0}, ["phonebok", "phonebook", "copy", "mqar"]),
    ("data.synthetic.tasks", {}, ["tasks is empty; name at least one of phonebook, copy, mqar"]),
    ("data.synthetic.phonebook_digits", 5, ["data.synthetic.phonebook_digits is 5", "4, 7 or 10"]),
    ("model", 3, ["model is 3"]),
])
def test_impossible_values_are_refused_with_key_value_and_what_is_allowed(
        data: dict, key: str, value: Any, parts: list[str]) -> None:
    message = refused(change(data, key, value))
    for part in parts:
        assert part in message


def test_every_fault_is_named_at_once(data: dict) -> None:
    message = refused(change(change(data, "train.steps", 0), "optim.lr", -1.0))
    assert len(message.splitlines()) == 2
    assert "train.steps is 0" in message
    assert "optim.lr is -1.0" in message


def test_the_width_of_mamba2_is_given_in_one_way(data: dict) -> None:
    rule = "model.mamba2: give one of expand and n_heads, which both set d_inner; found"
    assert f"{rule} expand (2) and n_heads (6)." in refused(change(copy.deepcopy(data), "model.mamba2.n_heads", 6))
    assert f"{rule} neither." in refused(change(data, "model.mamba2.expand", None))


def test_mamba2_may_have_any_number_of_heads(data: dict, tmp_path: Path) -> None:
    change(change(data, "model.mamba2.expand", None), "model.mamba2.n_heads", 7)
    recipe = validate(Recipe, data, "mine.toml")
    assert recipe.model.mamba2.d_inner(recipe.model.d_model) == 7 * 32
    (tmp_path / "mine.toml").write_text(to_toml(recipe))
    assert validate(Recipe, read_toml(tmp_path / "mine.toml"), "again") == recipe
    assert "n_groups (2) must divide the number of heads, mamba2.n_heads = 7" in refused(
        change(data, "model.mamba2.n_groups", 2))


@pytest.mark.parametrize(("section", "symbol"), [("mamba2", "M"), ("attention", "*"), ("mlp", "-")])
def test_a_layer_without_its_section_is_refused(data: dict, section: str, symbol: str) -> None:
    message = refused(change(data, f"model.{section}", None))
    assert f"pattern has '{symbol}' layers but there is no section [model.{section}]; add it." in message


def test_a_section_without_its_layer_is_refused(data: dict) -> None:
    section = {"d_state": 16, "expand": 2, "d_conv": 4, "dt_rank": 6, "chunk_len": 16}
    message = refused(change(data, "model.mamba1", section))
    assert "section [model.mamba1] has no effect: pattern has no '1'; remove it." in message


def test_ratios_without_a_number_of_layers_are_refused(data: dict) -> None:
    assert "attention_ratio and mlp_ratio need n_layers" in refused(change(data, "model.n_layers", None))


def test_a_pattern_that_does_not_match_its_ratios_is_refused(data: dict) -> None:
    assert "wrong length: got 3, expected 12" in refused(change(data, "model.pattern", "M*-"))
    assert "must match the number in the overridden pattern" in refused(change(data, "model.pattern", "M" * 12))


def test_a_key_that_could_not_take_effect_is_refused(data: dict) -> None:
    good = copy.deepcopy(data)
    assert "min_lr has no effect" in refused(change(copy.deepcopy(good), "optim.schedule", "constant"))
    assert 'decay_samples has no effect with schedule = "cosine"' in refused(
        change(copy.deepcopy(good), "optim.decay_samples", 100))
    assert 'schedule = "wsd" needs decay_samples' in refused(change(copy.deepcopy(good), "optim.schedule", "wsd"))
    assert 'schedule = "cosine" needs min_lr' in refused(change(copy.deepcopy(good), "optim.min_lr", None))
    mamba2 = {"name": "mine", **read_toml(find("recipes", "tiny-mamba2"))}
    assert "output_init_std has no effect" in refused(change(mamba2, "model.output_init_std", 0.01))


@pytest.mark.parametrize(("changes", "message"), [
    ({"positions": "rope"}, 'positions = "rope" needs both rope_fraction and rope_base'),
    ({"positions": "rope", "rope_fraction": 0.5}, 'positions = "rope" needs both rope_fraction and rope_base'),
    ({"positions": "rope", "rope_base": 10000.0}, 'positions = "rope" needs both rope_fraction and rope_base'),
    ({"rope_base": 10000.0}, 'rope_base has no effect with positions = "none"'),
    ({"positions": "rope", "rope_base": 10000.0, "rope_fraction": 0.1}, "rotates 3 dimensions"),
    ({"positions": "rope", "rope_base": 10000.0, "rope_fraction": 0.01}, "rotates 0 dimensions"),
    ({"positions": "rope", "rope_base": 10000.0, "rope_fraction": 1.5}, "rope_fraction is 1.5"),
    ({"positions": "alibi"}, "positions is 'alibi'"),
])
def test_rotary_positions_need_all_and_only_their_keys(data: dict, changes: dict, message: str) -> None:
    data["model"]["attention"] |= changes
    assert message in refused(data)


def test_sections_cannot_be_changed_once_read(data: dict) -> None:
    recipe = validate(Recipe, data, "mine.toml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3
    assert isinstance(recipe.model.mamba2, Mamba2Config)


def test_depth_counts_layers_without_cuts(data: dict) -> None:
    recipe = validate(Recipe, change(data, "model.pattern", "M-M-M-|*-M-M-"), "mine.toml")
    assert isinstance(recipe.model, ModelConfig)
    assert recipe.model.depth == 12


@pytest.mark.parametrize(("override", "read", "expected"), [
    ("train.steps=7", lambda r: r.train.steps, 7),
    (" train.steps = 7", lambda r: r.train.steps, 7),
    ("optim.lr=1e-3", lambda r: r.optim.lr, 1e-3),
    ('data.path="/some/where"', lambda r: r.data.path, "/some/where"),
    ("data.path=/some/where", lambda r: r.data.path, "/some/where"),
    ("data.path=a=b", lambda r: r.data.path, "a=b"),
    ("model.tie_embeddings=false", lambda r: r.model.tie_embeddings, False),
    ("data.synthetic.tasks={copy=2.0}", lambda r: r.data.synthetic.tasks, {"copy": 2.0}),
    ("train.eval_every=5", lambda r: r.train.eval_every, 5),
    ('train.loggers=["wandb"]', lambda r: r.train.loggers, ["wandb"]),
    ("name=other", lambda r: r.name, "other"),
    ("model.pattern=M-M*-M", lambda r: r.model.pattern, "M-M*-M"),
])
def test_an_override_sets_one_value(override: str, read: Any, expected: Any) -> None:
    assert read(load_recipe("tiny-hybrid", [override])) == expected


def test_later_overrides_win_and_sections_may_be_new() -> None:
    assert load_recipe("tiny-mamba", ["train.steps=1", "train.steps=2"]).train.steps == 2
    table: dict[str, Any] = {}
    apply_override(table, "a.b.c=[1, 2]")
    assert table == {"a": {"b": {"c": [1, 2]}}}


@pytest.mark.parametrize(("override", "message"), [
    ("train.steps", "override 'train.steps' is not of the form key=value"),
    ("=3", "override '=3' is not of the form key=value"),
    ("train..steps=3", "an empty name between dots"),
    ("train.steps.more=3", "steps is a value, not a section"),
    ("train.stepz=3", "unknown key train.stepz. Did you mean train.steps?"),
    ("train.steps=many", "train.steps is 'many'"),
    ("train.steps=", "train.steps is ''"),
    ("train.steps=3\nother = 4", "train.steps is '3\\nother = 4'"),
    ("optim.lr=true", "optim.lr is True"),
    ("optim.lr=1e-5", "must not exceed lr (1e-05)"),
])
def test_a_malformed_or_unknown_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny-hybrid", [override])
    assert message in str(caught.value)


def test_every_key_of_a_recipe_is_known() -> None:
    keys = known_keys(Recipe)
    assert len(keys) == len(set(keys))
    for key in ("model.mamba2.chunk_len", "data.synthetic.tasks", "optim.warmup_samples", "train.precision", "name"):
        assert key in keys


@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_a_written_recipe_reads_back_equal_section_by_section(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    for section in (recipe.data, recipe.optim, recipe.train, recipe.model):
        path = tmp_path / "section.toml"
        path.write_text(to_toml(section), encoding="utf-8")
        assert validate(type(section), read_toml(path), "section.toml") == section
    assert [type(s) for s in (recipe.data, recipe.optim, recipe.train)] == [DataConfig, OptimConfig, TrainConfig]


def test_a_section_with_empty_options_is_written_without_them() -> None:
    section = SyntheticConfig(share=0.5, tasks={"copy": 1.0})
    assert "phonebook_digits = 10" in to_toml(section)
    assert "path" not in to_toml(DataConfig(boundaries="leak"))


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'8b-hybird' *\. Did you mean 8b-hybrid\?"):
        load_recipe("8b-hybird")
    with pytest.raises(ConfigError, match=r"Shipped: .*tiny-hybrid"):
        load_recipe("qqqq/zzzzzz")


def test_a_shipped_recipe_is_found_with_and_without_its_ending() -> None:
    assert find("recipes", "tiny-mamba") == find("recipes", "tiny-mamba.toml")
    assert load_recipe("tiny-mamba.toml").name == "tiny-mamba"


def test_a_recipe_of_ones_own_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    path.write_text(find("recipes", "tiny-mamba").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recipe(path).name == "wide"
    assert load_recipe(str(path)).model == load_recipe("tiny-mamba").model


@pytest.mark.parametrize("content", [b"steps: 3\n", b"\x89PNG\r\n\x1a\n\x00\xff", b"[train\n", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.toml: not a TOML file"):
        load_recipe(path)


def test_a_file_with_another_ending_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 3")
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*rename it to mine\.toml"):
        load_recipe(path)


def test_a_shipped_name_wins_over_a_file_without_an_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-mamba").write_text("not a recipe")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny-mamba").model.pattern.startswith("1")


def test_an_empty_file_misses_every_section(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    for section in ("description", "model", "data", "optim", "train"):
        assert f"mine.toml: {section} is missing" in str(caught.value)


def test_a_file_without_read_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = 1")

    def denied(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    # root reads everything, so the permission bits alone would prove nothing
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"mine\.toml: cannot be read: Permission denied"):
        load_recipe(path)


def test_a_folder_without_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: Any) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ConfigError, match=r"mine\.toml: cannot be read: Permission denied"):
        load_recipe(tmp_path / "mine.toml")
