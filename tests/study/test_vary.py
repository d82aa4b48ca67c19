"""Variants of a study are recipes with the keys that it says, matched as it says, and nothing else changes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_claims import fig

from hinny import counts
from hinny.config import Recipe, find, load_recipe
from hinny.errors import ConfigError
from hinny.study.claims import judge
from hinny.study.collect import Table, collect, describe, read_table, sweeps
from hinny.study.config import StudyConfig, load_recipes, load_study
from hinny.study.folder import claim_folder
from hinny.study.plan import Layout, stages

STUDY = """
description = "Variants."
seeds = [1, 2]
match_tolerance = 0.02
[prepare]
[eval]
tasks = ["heldout"]
samples = 4
lengths = [64]
pairs = [2]
windows = 4
[[vary]]
name = "none"
recipe = "tiny-hybrid"
plot = "Attention"
line = "a third MLP"
x = "attention"
[vary.overrides]
"model.attention_ratio" = 0.0
"model.attention" = "null"
"model.mlp.activation" = "gelu"
[[vary]]
name = "attention"
recipe = "tiny-hybrid"
values = [0.17, 0.33]
fit = { key = "model.mlp.d_ff", step = 4 }
plot = "Attention"
line = "a third MLP"
x = "attention"
overrides = { "model.attention_ratio" = "{value}" }
[[vary]]
name = "placed"
recipe = "tiny-hybrid"
values = ["first", "last"]
fit = { key = "model.mlp.d_ff", step = 4 }
plot = "Placed"
also = { "attention-0.17" = "even" }
[vary.overrides]
"model.n_layers" = "null"
"model.attention_ratio" = "null"
"model.mlp_ratio" = "null"
[vary.each]
"model.pattern" = ["*MM-M-", "MM-M-*"]
"""


def study(tmp_path: Path, text: str = STUDY, *overrides: str) -> StudyConfig:
    (tmp_path / "varied.toml").write_text(text)
    return load_study(tmp_path / "varied.toml", overrides)


def size(recipe: Recipe) -> int:
    return counts.parameters(recipe.model).non_embedding


def test_each_value_is_a_model_of_its_own_name_with_the_keys_that_are_said(tmp_path: Path) -> None:
    recipes = load_recipes(study(tmp_path))
    assert list(recipes) == ["none", "attention-0.17", "attention-0.33", "placed-first", "placed-last"]
    assert {name: recipe.name for name, recipe in recipes.items()} == {name: name for name in recipes}
    assert [recipe.model.pattern for recipe in recipes.values()] == [
        "MM-MM-", "MM-*M-", "M*-M*-", "*MM-M-", "MM-M-*"]
    assert recipes["none"].model.attention is None
    plain = load_recipe("tiny-hybrid")
    for recipe in recipes.values():
        assert (recipe.optim, recipe.train, recipe.data) == (plain.optim, plain.train, plain.data)
        assert recipe.model.mamba2 == plain.model.mamba2


def test_a_fitted_key_is_the_multiple_that_comes_nearest_to_the_first_of_the_group(tmp_path: Path) -> None:
    recipes = load_recipes(study(tmp_path))
    target = size(recipes["none"])
    for recipe in list(recipes.values())[1:]:
        assert recipe.model.mlp is not None
        chosen = recipe.model.mlp.d_ff
        assert chosen % 4 == 0
        mlps = recipe.model.pattern.count("-")
        # a column in and one out, a layer
        steps = {d: size(recipe) + (d - chosen) * 2 * recipe.model.d_model * mlps for d in range(4, 2 * chosen, 4)}
        assert min(steps, key=lambda d: abs(steps[d] - target)) == chosen


@pytest.mark.parametrize(("by", "key"), [("flops", "model.mlp.d_ff"), ("state", "model.attention.n_kv_heads")])
def test_models_are_matched_by_flops_or_by_state_where_that_is_asked(tmp_path: Path, by: str, key: str) -> None:
    text = STUDY.split("[[vary]]")[0].replace("match_tolerance = 0.02", f"""
match_tolerance = 0.1
match_by = "{by}"
{'match_context = 200' if by == 'state' else ''}
recipes = ["tiny-hybrid", "tiny-transformer"]
fit = [{{ recipes = ["tiny-transformer"], key = "{key}" }}]
""")
    # of the state of 3 Mamba-2 layers and a cache of 2 heads against a cache of 4
    recipes = load_recipes(study(tmp_path, text, *(["match_tolerance=0.6"] if by == "state" else [])))
    one, other = recipes.values()
    fitted = {value: load_recipe("tiny-transformer", [f"{key}={value}"]) for value in
              ((1, 2, 4) if by == "state" else range(300, 900))}

    def measure(recipe: Recipe) -> int:
        if by == "flops":
            return counts.training_flops(recipe.model, recipe.train.seq_len)
        return counts.state_bytes(recipe.model) + 200 * counts.kv_bytes_per_token(recipe.model)

    best = min(fitted, key=lambda value: abs(measure(fitted[value]) - measure(one)))
    assert other.model == fitted[best].model


def test_a_key_that_does_not_change_what_is_matched_cannot_be_fitted(tmp_path: Path) -> None:
    for recipes in (["tiny-hybrid", "tiny-transformer"], ["tiny-transformer", "tiny-hybrid"]):
        text = STUDY.split("[[vary]]")[0].replace("match_tolerance = 0.02", f"""
match_tolerance = 0.9
match_by = "state"
match_context = 200
recipes = {json.dumps(recipes)}
fit = [{{ recipes = ["{recipes[1]}"], key = "model.mlp.d_ff" }}]
""")
        with pytest.raises(ConfigError, match=r"cannot be fitted: it does not change the bytes of state"):
            load_recipes(study(tmp_path, text))


def test_only_models_of_one_group_are_matched(tmp_path: Path) -> None:
    text = STUDY.split("[[vary]]")[0] + """
[[vary]]
name = "t"
recipe = "tiny-transformer"
values = [64, 128]
group = "{value}"
overrides = { "model.d_model" = "{value}" }
[[vary]]
name = "h"
recipe = "tiny-hybrid"
values = [64, 128]
group = "{value}"
fit = { key = "model.mlp.d_ff", step = 2 }
overrides = { "model.d_model" = "{value}" }
"""
    recipes = load_recipes(study(tmp_path, text))
    assert [recipe.model.d_model for recipe in recipes.values()] == [64, 128, 64, 128]
    assert size(recipes["t-128"]) > 1.9 * size(recipes["t-64"])
    with pytest.raises(ConfigError, match=r"t-128 has .* match_tolerance allows 2\.0%"):
        load_recipes(study(tmp_path, text.replace('group = "{value}"\n', "")))


@pytest.mark.parametrize(("old", "new", "message"), [
    ("values = [0.17, 0.33]", "values = [0.17, 0.17]", "two variants are called attention-0.17"),
    ('plot = "Placed"\nalso = { "attention-0.17" = "even" }', 'line = "x"', "line has no effect without plot"),
    ('["*MM-M-", "MM-M-*"]', '["*MM-M-"]', "each.model.pattern has 1 items for 2 values"),
    ('values = ["first", "last"]\n', "", "each has no effect without values"),
    ('plot = "Placed"\n', "", "also has no effect without plot"),
    ('overrides = { "model.attention_ratio" = "{value}" }', "", "attention-0.17 and attention-0.33 are one model"),
    ('"first", "last"', '"../first", "last"', "a value that is text is part of a folder's name"),
    ('"first", "last"', '"", "last"', "a value that is text is part of a folder's name"),
    ("attention-0.17", "attention-0.2", "also names attention-0.2, which the study does not have"),
    ('"model.mlp.activation" = "gelu"', '"train.seed" = 3', "may not set train.seed"),
    ('"model.mlp.activation" = "gelu"', '"model.mlp.activatoin" = "gelu"', "unknown key model.mlp.activatoin"),
    ('"model.mlp.activation" = "gelu"', '"optim.lr" = 9e-4', "the recipes differ in optim.lr"),
    ('fit = { key = "model.mlp.d_ff", step = 4 }\nplot = "Placed"',
     'fit = { key = "model.mlp.activation" }\nplot = "Placed"', "placed-first: model.mlp.activation cannot be fitted"),
    ('name = "none"', 'name = "none"\nfit = { key = "model.mlp.d_ff" }', "vary 'none': fit has no effect"),
    ('plot = "Placed"', 'plot = "Attention"', "vary 'placed': x is 'value', and 'attention' in another entry"),
    ("match_tolerance = 0.02", 'match_tolerance = 0.02\nmatch_by = "state"', "match_context and match_by"),
    ("match_tolerance = 0.02", "match_tolerance = 0.02\nmatch_context = 9", "match_context and match_by"),
    ("match_tolerance = 0.02", 'match_tolerance = 0.02\nfit = [{recipes=["tiny-mamba"],key="model.d_model"}]',
     "fit.recipes names 'tiny-mamba', which the study does not"),
])
def test_what_cannot_be_varied_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        load_recipes(study(tmp_path, STUDY.replace(old, new)))


def test_a_study_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipes is empty and there is no \[\[vary\]\]"):
        study(tmp_path, STUDY.split("[[vary]]")[0])


def test_a_variant_is_trained_by_the_recipe_that_the_study_wrote(tmp_path: Path) -> None:
    config = study(tmp_path)
    recipes, layout = load_recipes(config), Layout(tmp_path / "out")
    claim_folder(config, recipes, layout)
    _, trainings = stages(config, recipes, layout, cores=2)
    argv = trainings.chains[0][0].argv
    assert argv[:3] == ("train", str(tmp_path / "out" / "recipes" / "none.toml"), "train.seed=1")
    assert len(trainings.chains) == 2 * len(recipes)
    for name, recipe in recipes.items():
        assert load_recipe(layout.recipe(name)) == recipe
    # and the same study finds its folder again, also with one entry more
    claim_folder(study(tmp_path), load_recipes(study(tmp_path)), layout)
    more = study(tmp_path, STUDY + '[[vary]]\nname = "more"\nrecipe = "tiny-hybrid"\ngroup = "g"\n')
    claim_folder(more, load_recipes(more), layout)


def test_where_models_stand_on_the_page_may_change_in_a_folder_and_what_they_are_may_not(tmp_path: Path) -> None:
    config, layout = study(tmp_path), Layout(tmp_path / "out")
    claim_folder(config, load_recipes(config), layout)

    def again(**changes: object) -> None:
        first, *rest = config.vary
        changed = config.model_copy(update={"vary": [first.model_copy(update=changes), *rest]})
        claim_folder(changed, load_recipes(changed), layout)

    again(plot="Another", line="other words")
    with pytest.raises(ConfigError, match="vary was"):
        again(group="elsewhere")


def test_lines_know_where_their_models_stand(tmp_path: Path) -> None:
    config = study(tmp_path)
    attention, placed = sweeps(config.vary, load_recipes(config))
    assert (attention["plot"], attention["line"], attention["x"]) == ("Attention", "a third MLP", "attention")
    assert [(m["recipe"], m["x"]) for m in attention["members"]] == [
        ("none", 0.0), ("attention-0.17", 1 / 6), ("attention-0.33", 2 / 6)]
    assert [(m["recipe"], m["value"], m["x"]) for m in placed["members"]] == [
        ("attention-0.17", "even", None), ("placed-first", "first", None), ("placed-last", "last", None)]


def test_lines_know_in_what_their_models_differ(tmp_path: Path) -> None:
    def differ(text: str) -> list[str]:
        varied = [key for key in ("optim.lr", "train.micro_batch_size") if key in text]
        config = study(tmp_path, text, f"may_differ={json.dumps(varied)}")
        return list(sweeps(config.vary, load_recipes(config))[0]["differ"])

    assert set(differ(STUDY)) == {"model.pattern", "model.attention_ratio"}
    assert set(differ(STUDY.replace('activation" = "gelu"', 'activation" = "relu2"'))) == {
        "model.pattern", "model.attention_ratio", "model.mlp.activation"}
    assert set(differ(STUDY.replace('"model.mlp.activation" = "gelu"', '"optim.lr" = 9e-4'))) == {
        "model.pattern", "model.attention_ratio", "optim.lr"}
    # how many sequences lie in memory at a time makes no other model
    assert set(differ(STUDY.replace('"model.mlp.activation" = "gelu"', '"train.micro_batch_size" = 2'))) == {
        "model.pattern", "model.attention_ratio"}


def test_the_folder_knows_which_models_are_matched_with_each_other(tmp_path: Path) -> None:
    text = STUDY + '[[vary]]\nname = "more"\nrecipe = "tiny-hybrid"\ngroup = "large"\n'
    config = study(tmp_path, text)
    layout = Layout(tmp_path / "out")
    claim_folder(config, load_recipes(config), layout)
    layout.results.mkdir()
    collect(layout.root)
    told = read_table(layout.root).about["recipes"]
    assert {name: about["group"] for name, about in told.items()} == {
        "none": "", "attention-0.17": "", "attention-0.33": "", "placed-first": "", "placed-last": "", "more": "large"}


def test_the_lines_of_the_shipped_sweep_are_judged() -> None:
    config = load_study("ratio")
    recipes = load_recipes(config)
    told = {name: describe(recipe) for name, recipe in recipes.items()}
    figures = [fig("held_out_loss", name, 3.0, 0.001) for name in recipes]
    judged = {one.claim.id: one.verdict for one in judge(Table(figures, {
        "recipes": told, "predicted": {}, "sweeps": sweeps(config.vary, recipes)}))}
    assert all("Held-out loss" in judged[name].sentence for name in ("C1", "C3", "C5", "C6", "C7"))


@pytest.mark.parametrize(("name", "models"), [("ratio", 15), ("scaling", 12)])
def test_the_shipped_sweeps_are_matched_and_stand_on_their_plots(name: str, models: int) -> None:
    config = load_study(name)
    recipes = load_recipes(config)
    assert len(recipes) == models
    lines = sweeps(config.vary, recipes)
    assert {member["recipe"] for line in lines for member in line["members"]} == set(recipes)
    if name == "ratio":
        shares = {line["x"]: sorted(round(100 * m["x"]) for m in line["members"]) for line in lines[:2]}
        assert shares == {"mlp": [0, 29, 50], "attention": [0, 2, 4, 8, 17, 25, 50]}
        assert len(config.seeds) >= 2
    else:
        assert [[m["x"] for m in line["members"]] for line in lines] == [
            [float(size(recipes[m["recipe"]])) for m in line["members"]] for line in lines]
        assert all(len(line["members"]) == 3 for line in lines)
    json.dumps(lines)


def test_the_studies_of_the_page_on_studies_can_be_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    whole, fit, vary = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    ours = find("recipes", "30m-mamba2").read_text().replace("lr = 2e-3", "lr = 1e-3")
    (tmp_path / "ours.toml").write_text(ours)
    whole = whole.replace('"ours.toml"', f'"{tmp_path / "ours.toml"}"')
    assert list(load_recipes(study(tmp_path, whole + vary))) == [
        "30m-transformer", "ours", "attention-0.04", "attention-0.08", "attention-0.25"]
    head, entry = fit.split("[[fit]]")
    fitted = whole.replace('may_differ = ["optim.lr"]', "").replace(str(tmp_path / "ours.toml"), "30m-mamba2")
    chosen = load_recipes(study(tmp_path, f"{head}{fitted}[[fit]]{entry}", "match_tolerance=0.05"))
    flops = [counts.training_flops(recipe.model, recipe.train.seq_len) for recipe in chosen.values()]
    assert max(flops) / min(flops) < 1.05
