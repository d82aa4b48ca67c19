"""A study as command lines: what is compared, what counts as done, what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hinny.config import Recipe, load_recipe, to_toml
from hinny.errors import ConfigError, RunError
from hinny.run import Run, write_atomically
from hinny.study.collect import collect, family, read_table
from hinny.study.config import EvalConfig, StudyConfig, differences, load_recipes, load_study
from hinny.study.done import checkpoint
from hinny.study.folder import claim_folder
from hinny.study.plan import Layout, stages

Quick = tuple[StudyConfig, dict[str, Recipe]]


def test_the_shipped_study_compares_one_recipe_of_each_family_alike() -> None:
    config = load_study("quick")
    recipes = load_recipes(config)
    assert [family(recipe.model) for recipe in recipes.values()] == ["transformer", "mamba", "mamba2", "hybrid"]
    assert len(config.seeds) >= 2
    (length,) = {recipe.train.seq_len for recipe in recipes.values()}
    assert min(config.eval.lengths) <= length < max(config.eval.lengths)
    assert differences(recipes) == {}


def test_training_comes_before_timing_and_each_run_is_evaluated_in_its_slot(quick: Quick, tmp_path: Path) -> None:
    prepare, runs, timings = stages(*quick, Layout(tmp_path), cores=2)
    assert [job.name for chain in prepare.chains for job in chain] == ["prepare"]
    assert (runs.jobs, len(runs.chains), timings.jobs, len(timings.chains)) == (2, 8, 1, 1)
    train, evaluate = runs.chains[0]
    run = str(tmp_path / "runs" / "tiny-transformer-s1")
    assert train.argv == ("train", "tiny-transformer", "train.seed=1", "train.seq_len=256", "train.batch_size=16",
                          "train.micro_batch_size=16", "train.steps=300", "train.eval_every=50",
                          "--data", str(tmp_path / "data"), "--out", run, "--threads", "1")
    assert evaluate.argv[:6] == ("eval", run, "heldout", "phonebook", "mqar", "copy")
    assert [job.argv[1] for job in timings.chains[0]] == ["generate", "train"] * 4
    # documents are packed in the study's batches: random tokens would be another work
    data = timings.chains[0][1].argv.index("--data") + 1
    assert timings.chains[0][1].argv[data] == str(tmp_path / "data")
    assert all(job.argv[-2:] == ("--threads", "2") for job in timings.chains[0])


def test_jobs_of_the_study_are_not_more_than_told(quick: Quick, tmp_path: Path) -> None:
    config = quick[0].model_copy(update={"jobs": 3})
    assert stages(config, quick[1], Layout(tmp_path), cores=2)[1].jobs == 3


def test_a_training_is_done_when_its_last_checkpoint_is_whole(quick: Quick, tmp_path: Path) -> None:
    train, evaluate = stages(*quick, Layout(tmp_path), cores=1)[1].chains[0]
    recipe = quick[1]["tiny-transformer"]
    assert train.run is not None
    last = checkpoint(train.run, recipe)
    last.with_name("step-00000100").mkdir(parents=True)
    assert not train.done()
    last.mkdir()
    assert train.done()
    assert not evaluate.done()
    assert Run(train.run).steps_done == train.steps


def test_a_training_on_other_data_is_not_reused(quick: Quick, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    train = stages(*quick, layout, cores=1)[1].chains[0][0]
    assert train.run is not None
    checkpoint(train.run, quick[1]["tiny-transformer"]).mkdir(parents=True)
    layout.data.mkdir()
    for folder in (train.run, layout.data):
        (folder / "data.json").write_text('{"fingerprint": "one"}')
    assert train.done()
    (layout.data / "data.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(RunError, match="was trained on other data"):
        train.done()


def test_an_evaluation_older_than_the_checkpoint_is_made_again(quick: Quick, tmp_path: Path) -> None:
    train, evaluate = stages(*quick, Layout(tmp_path), cores=1)[1].chains[0]
    assert train.run is not None
    last = checkpoint(train.run, quick[1]["tiny-transformer"])
    last.mkdir(parents=True)
    _write_results(train.run, quick[0].eval)
    assert evaluate.done()
    os.utime(last, (2e9, 2e9))
    assert not evaluate.done()


def test_results_of_an_evaluation_by_hand_are_not_taken_for_the_studys(quick: Quick, tmp_path: Path) -> None:
    train, evaluate = stages(*quick, Layout(tmp_path), cores=1)[1].chains[0]
    assert train.run is not None
    checkpoint(train.run, quick[1]["tiny-transformer"]).mkdir(parents=True)
    _write_results(train.run, quick[0].eval)
    assert evaluate.done()
    _write_results(train.run, quick[0].eval.model_copy(update={"samples": 4, "tasks": ["copy"]}))
    assert not evaluate.done()


def _write_results(run: Path, asked: EvalConfig) -> None:
    """Results and records of the tasks, without a figure, as `hinny eval` writes them."""
    for task in asked.tasks:
        Run(run).save_rows(task, [])
        key = {"samples": asked.samples} if task != "heldout" else {"windows": asked.windows}
        write_atomically(run / "evals" / f"{task}.json", json.dumps({"key": {"version": "1", **key}, "units": []}))


def test_text_of_ones_own_reaches_prepare(study_file: Path, tmp_path: Path) -> None:
    config = load_study(study_file, ['prepare.text=["a.txt", "b"]'])
    recipes = load_recipes(config)
    vocab_size = str(recipes["tiny-hybrid"].model.vocab_size)
    prepare = stages(config, recipes, Layout(tmp_path), 1)[0].chains[0][0]
    assert prepare.argv == ("prepare", str(tmp_path / "data"), "--text", "a.txt", "--text", "b", "--vocab-size",
                            vocab_size, "--recall-words")


@pytest.mark.parametrize(("override", "message"), [
    ("recipes=['tiny-mamba', 'tiny-mamba']", "recipes names the same one twice"),
    ("overrides.train.seed=3", "overrides may not set train.seed"),
    ("prepare.jsonl='x'", "jsonl and field belong together"),
    ("sedes=[1]", "unknown key sedes. Did you mean seeds?"),
    ("eval.lengths=[0]", "eval.lengths.0 is 0"),
])
def test_an_impossible_study_is_refused_with_its_key(study_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"trial\.toml") as refusal:
        load_study(study_file, [override])
    assert message in str(refusal.value)


def test_models_of_unequal_size_are_refused_with_their_counts(study_file: Path) -> None:
    config = load_study(study_file, ["match_tolerance=0.000001"])
    with pytest.raises(ConfigError, match="non-embedding parameters") as refusal:
        load_recipes(config)
    assert "match_tolerance allows 0.0%" in str(refusal.value)


def test_recipes_of_two_vocabularies_are_refused(study_file: Path, tmp_path: Path) -> None:
    config = two_recipes(study_file, tmp_path)
    path = tmp_path / "other.toml"
    path.write_text(re.sub(r"vocab_size = \d+", "vocab_size = 512", path.read_text()))
    with pytest.raises(ConfigError, match=r"differ in model\.vocab_size.*512 in other"):
        load_recipes(config)


def two_recipes(study_file: Path, folder: Path, **changes: Any) -> StudyConfig:
    """A study of tiny-mamba2 and a copy of it in which `changes` of optim are made."""
    other = load_recipe("tiny-mamba2", [f"optim.{key}={value}" for key, value in changes.items()])
    path = folder / "other.toml"
    path.write_text(to_toml(other.model_copy(update={"name": "other"})))
    return load_study(study_file, [f"recipes=['tiny-mamba2', '{path}']"])


def test_unequal_optimisers_are_refused_unless_the_study_allows_them(study_file: Path, tmp_path: Path) -> None:
    config, lr = two_recipes(study_file, tmp_path, lr=0.5), load_recipe("tiny-mamba2").optim.lr
    with pytest.raises(ConfigError, match=f"differ in optim.lr: {lr} in tiny-mamba2, 0.5 in other") as refusal:
        load_recipes(config)
    assert 'may_differ = ["optim.lr"]' in str(refusal.value)
    allowed = load_recipes(config.model_copy(update={"may_differ": ["optim.lr"]}))
    assert differences(allowed) == {"optim.lr": {"tiny-mamba2": lr, "other": 0.5}}
    with pytest.raises(ConfigError, match=r"may_differ names optim\.clip"):
        load_recipes(config.model_copy(update={"may_differ": ["optim.lr", "optim.clip"]}))


def test_a_folder_of_a_changed_study_is_refused_and_named(study_file: Path, tmp_path: Path) -> None:
    config = load_study(study_file)
    recipes = load_recipes(config)
    claim_folder(config, recipes, Layout(tmp_path))
    claim_folder(config.model_copy(update={"jobs": 5, "description": "other words"}), recipes, Layout(tmp_path))
    changed = load_study(study_file, ["overrides.train.steps=7"])
    with pytest.raises(ConfigError, match=r"overrides\.train\.steps was 300 and is now 7") as refusal:
        claim_folder(changed, load_recipes(changed), Layout(tmp_path))
    assert "--out" in str(refusal.value)


def test_two_recipes_of_one_name_are_refused_before_anything_is_written(study_file: Path, tmp_path: Path) -> None:
    config = two_recipes(study_file, tmp_path)
    path = tmp_path / "other.toml"
    path.write_text(path.read_text().replace('name = "other"', 'name = "tiny-mamba2"'))
    with pytest.raises(ConfigError, match=r"tiny-mamba2 and .*other\.toml are both recipes of the name 'tiny-mamba2'"):
        load_recipes(config)


def test_a_recipe_goes_by_its_name_and_not_by_its_files(study_file: Path, tmp_path: Path) -> None:
    config = two_recipes(study_file, tmp_path)
    path = tmp_path / "other.toml"
    path.write_text(path.read_text().replace('name = "other"', 'name = "inner"'))
    claim_folder(config, load_recipes(config), Layout(tmp_path / "out"))
    collect(tmp_path / "out")
    assert list(read_table(tmp_path / "out").about["recipes"]) == ["tiny-mamba2", "inner"]


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(study_file: Path, tmp_path: Path) -> None:
    config, out = load_study(study_file), tmp_path / "out"
    out.write_text("a file in the folder's place")
    with pytest.raises(RunError, match=f"{out}.* cannot be written: (File exists|Not a directory)"):
        claim_folder(config, load_recipes(config), Layout(out))
    assert out.read_text() == "a file in the folder's place"


def test_a_folder_that_cannot_be_read_is_named_with_the_reason(
        study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    config = load_study(study_file)
    recipes = load_recipes(config)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(RunError, match=f"{tmp_path} cannot be used as a study's folder: Permission denied"):
        claim_folder(config, recipes, Layout(tmp_path))


def test_a_recipe_that_changed_since_the_runs_is_refused(study_file: Path, tmp_path: Path) -> None:
    config = two_recipes(study_file, tmp_path)
    claim_folder(config, load_recipes(config), Layout(tmp_path / "out"))
    text = (tmp_path / "other.toml").read_text()
    (tmp_path / "other.toml").write_text(text.replace("weight_decay = 0.1", "weight_decay = 0.2"))
    config = config.model_copy(update={"may_differ": ["optim.weight_decay"]})
    with pytest.raises(ConfigError, match="may_differ was"):
        claim_folder(config, load_recipes(config), Layout(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"other.toml.*optim.weight_decay was 0.1 and is now 0.2"):
        claim_folder(config.model_copy(update={"may_differ": []}), load_recipes(config), Layout(tmp_path / "out"))
