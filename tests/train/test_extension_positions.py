"""How a run with [init] may tell positions otherwise than its base: what is refused, and what is told."""

from __future__ import annotations

import logging

import pytest
from converted_runs import converted, values_of
from extensions import ROPE, changed, extended

from hinny.errors import ConfigError
from hinny.train.extension import MAY_DIFFER, NO_EFFECT
from hinny.train.loop import train


@pytest.fixture(scope="module")
def hybrid(recipe_of):
    recipe = recipe_of("M*-")
    return changed(recipe, model={"attention": ROPE})


@pytest.fixture(scope="module")
def base(hybrid, data, tmp_path_factory):
    return train(hybrid, tmp_path_factory.mktemp("base") / "run", data=data)


def warned(caplog) -> list[str]:
    """What training warned of."""
    return [record.getMessage() for record in caplog.records
            if record.name == "hinny.train" and record.levelno >= logging.WARNING]


def test_longer_rotary_positions_left_as_they_are_are_told(hybrid, base, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(hybrid, base.path, length=96), tmp_path / "long", data=data)
    assert "train.seq_len is 96, 3 times the 32 tokens" in caplog.text
    caplog.clear()
    raised = extended(hybrid, base.path, length=96, model={"attention": {**ROPE, "rope_base": 1000.0}})
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(raised, tmp_path / "raised", data=data)
        train(extended(hybrid, base.path, length=32), tmp_path / "equal", data=data)
    assert not [r for r in caplog.records if "rotary" in r.message]


def test_scaling_is_of_the_length_that_the_base_was_trained_on(hybrid, base, data, tmp_path, caplog):
    def scaled(trained, source=base.path, factor=4.0):
        scaling = {"method": "yarn", "factor": factor, "trained_len": trained}
        return extended(hybrid, source, length=96, model={"attention": {**ROPE, "rope_scaling": scaling}})

    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        longer = train(scaled(32), tmp_path / "long", data=data)
    assert not warned(caplog)
    with pytest.raises(ConfigError, match=r"trained_len is 48, and .* was trained on 32 tokens .* Set it to 32\."):
        train(scaled(48), tmp_path / "wrong", data=data)
    # a second extension is told the length before any scaling
    assert train(scaled(32, longer.path, 6.0), tmp_path / "again", data=data).finished
    folder = tmp_path / "converted"
    converted(folder, values_of(hybrid.model, seed=3), config=hybrid.model)
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(scaled(48, folder), tmp_path / "from-converted", data=data)
    assert "trained_len is 48" in caplog.text


def test_a_wrong_length_before_scaling_is_refused_at_any_length(hybrid, base, data, tmp_path):
    scaling = {"method": "yarn", "factor": 4.0, "trained_len": 8}
    recipe = extended(hybrid, base.path, length=32, model={"attention": {**ROPE, "rope_scaling": scaling}})
    with pytest.raises(ConfigError, match=r"trained_len is 8, and .* was trained on 32 tokens .* Set it to 32\."):
        train(recipe, tmp_path / "long", data=data)


def test_the_trained_length_of_a_base_in_segments_is_that_of_a_segment(hybrid, data, tmp_path, caplog):
    cut = changed(hybrid, train={"seq_len": 64, "segment_len": 16})
    base = train(cut, tmp_path / "cut", data=data)

    def scaled(trained):
        scaling = {"method": "yarn", "factor": 4.0, "trained_len": trained}
        return extended(hybrid, base.path, model={"attention": {**ROPE, "rope_scaling": scaling}})

    with pytest.raises(ConfigError, match=r"trained_len is 64, and .* was trained on 16 tokens .* Set it to 16\."):
        train(scaled(64), tmp_path / "false", data=data)
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(scaled(16), tmp_path / "true", data=data)
        # no position in these is new to attention
        train(extended(cut, base.path, length=96), tmp_path / "cut-on", data=data)
    assert not warned(caplog)
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(hybrid, base.path, length=64), tmp_path / "whole", data=data)
    assert "train.seq_len is 64, 4 times the 16 tokens" in caplog.text


YARN = {"method": "yarn", "factor": 4.0, "trained_len": 32}


@pytest.mark.parametrize(("theirs", "ours", "told"), [
    ({"rope_scaling": YARN}, {}, "rope_scaling: method yarn, factor 4.0, trained_len 32 → none."),
    ({"score_scale": 1.5}, {}, "score_scale: 1.5 → none."),
    ({"rope_base": 1000.0}, {}, "rope_base: 1000.0 → 100.0."),
    ({}, {"score_scale": 1.1}, "score_scale: none → 1.1."),
    ({}, {"rope_fraction": 1.0}, "rope_fraction: 0.5 → 1.0."),
    ({}, None, "positions: rope → none; model.attention.rope_base: 100.0 → none; model.attention.rope_fraction: 0.5 "
               "→ none."),
])
def test_other_positions_at_a_length_that_the_base_knows_are_told(hybrid, data, tmp_path, caplog, theirs, ours, told):
    base = train(changed(hybrid, model={"attention": {**ROPE, **theirs}}), tmp_path / "base", data=data)
    mine = ({**{k: v for k, v in ROPE.items() if not k.startswith("rope")}, "positions": "none"} if ours is None
            else {**ROPE, **ours})
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(hybrid, base.path, length=32, model={"attention": mine}), tmp_path / "on", data=data)
    assert f"attention tells positions otherwise than in {base.path}: model.attention.{told}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(hybrid, base.path, length=64, model={"attention": {**ROPE, **theirs}}), tmp_path / "same",
              data=data)
    assert "otherwise" not in caplog.text


@pytest.mark.parametrize("forgotten", [{"rope_scaling": YARN}, {"score_scale": 1.5}])
def test_a_scaling_that_a_longer_recipe_leaves_out_is_told(hybrid, data, tmp_path, caplog, forgotten):
    base = train(changed(hybrid, model={"attention": {**ROPE, **forgotten}}), tmp_path / "base", data=data)
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(hybrid, base.path, length=64), tmp_path / "on", data=data)
    assert f"model.attention.{next(iter(forgotten))}: " in caplog.text
    assert "stay as they are" not in caplog.text


@pytest.mark.parametrize("key", MAY_DIFFER)
def test_what_may_differ_from_the_base_may(recipe_of, data, tmp_path, key):
    models = {"attention.positions": {"attention": {**ROPE}}, "attention.rope_base": {"rope_base": 200.0},
              "attention.rope_fraction": {"rope_fraction": 1.0}, "attention.rope_scaling": {"rope_scaling": YARN},
              "attention.score_scale": {"score_scale": 1.1}}
    pattern = "1*-" if key.startswith("mamba1") else "M*-"
    plain = recipe_of(pattern)
    section, _, name = key.partition(".")
    table = plain.model_dump(mode="json", exclude_none=True)["model"]
    before, after = ({"attention": ROPE}, {"attention": {**ROPE, **models.get(key, {})}})
    if key == "attention.positions":
        before, after = {}, {"attention": ROPE}
    if name == "chunk_len":
        before = {}
        after = {section: {**table[section], "chunk_len": table[section]["chunk_len"] * 2}}
    base = train(changed(plain, model=before), tmp_path / "base", data=data)
    assert train(extended(plain, base.path, model=after), tmp_path / "long", data=data).finished


@pytest.mark.parametrize("key", [key for key in NO_EFFECT if "dt_" in key])
def test_bounds_of_first_steps_are_the_bases(recipe_of, data, tmp_path, key):
    plain = recipe_of("1-" if key.startswith("mamba1") else "M-")
    base = train(plain, tmp_path / "base", data=data)
    section, _, name = key.partition(".")
    table = plain.model_dump(mode="json", exclude_none=True)["model"][section]
    other = extended(plain, base.path, model={section: {**table, name: table[name] * 1.5}})
    assert train(other, tmp_path / "long", data=data).finished


def test_positions_on_a_base_without_them_are_told(recipe_of, data, tmp_path, caplog):
    plain = recipe_of("M*-")
    base = train(plain, tmp_path / "base", data=data)
    with caplog.at_level(logging.WARNING, logger="hinny.train"):
        train(extended(plain, base.path, model={"attention": ROPE}), tmp_path / "long", data=data)
    assert "was trained without positions on 32 tokens" in caplog.text
