"""Extensions in a study: which command lines they are, what is refused, and how their figures decide claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hinny import counts
from hinny.config import load_recipe
from hinny.errors import ConfigError, RunError
from hinny.run import Run, row, weights_print
from hinny.study.config import load_extensions, load_recipes, load_study
from hinny.study.folder import claim_folder
from hinny.study.gains import extended_rows
from hinny.study.longer import Extension
from hinny.study.plan import Layout, stages

STUDY = """
description = "Two models, extended."
recipes = ["tiny-transformer", "tiny-hybrid"]
seeds = [1, 2]
match_tolerance = 0.02
[overrides.train]
seq_len = 64
[prepare]
[eval]
tasks = ["heldout", "phonebook", "window-loss"]
samples = 4
lengths = [64, 128, 256]
pairs = [4]
windows = 8
[extension]
steps = 10
warmup_share = 0.5
[[extend]]
name = "plain"
recipes = ["tiny-transformer", "tiny-hybrid"]
factors = [2, 4]
[[extend]]
name = "drope"
recipes = ["tiny-transformer"]
factors = [4]
[extend.overrides]
"model.attention.positions" = "none"
"model.attention.rope_base" = "null"
"model.attention.rope_fraction" = "null"
"optim.lr" = 1e-3
"model.mlp.d_ff" = 688
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (study := tmp_path / "longer.toml").write_text(STUDY)
    return study


def plan_of(file: Path, root: Path, *overrides: str) -> Any:
    config = load_study(file, overrides)
    return stages(config, load_recipes(config), Layout(root), cores=2)


def test_extensions_are_trainings_that_begin_with_the_runs_of_their_seed(file: Path, tmp_path: Path) -> None:
    _, bases, longer = plan_of(file, tmp_path)
    assert len(bases.chains) == 4
    assert [chain[0].name for chain in longer.chains] == [
        f"extend {name}" for seed in (1, 2) for name in (
            f"tiny-transformer-s{seed}-plain-2x", f"tiny-transformer-s{seed}-plain-4x",
            f"tiny-hybrid-s{seed}-plain-2x", f"tiny-hybrid-s{seed}-plain-4x", f"tiny-transformer-s{seed}-drope-4x")]
    assert "optim.lr=0.0003" in longer.chains[0][0].argv
    extend, evaluate = longer.chains[4]
    run = tmp_path / "runs" / "tiny-transformer-s1-drope-4x"
    assert extend.argv == (
        "train", "tiny-transformer", "train.seed=1", "train.seq_len=64", "train.seq_len=256", "train.batch_size=1",
        "train.micro_batch_size=1", "train.steps=10", "train.save_every=10", "optim.lr=0.001",
        "optim.min_lr=3e-05", "optim.warmup_samples=5", "model.attention.positions=none",
        "model.attention.rope_base=null", "model.attention.rope_fraction=null",
        "model.mlp.d_ff=688", f"init.from={tmp_path / 'runs' / 'tiny-transformer-s1'}",
        "--data", str(tmp_path / "data"), "--out", str(run), "--threads", "1")
    assert evaluate.argv[:3] == ("eval", str(run), "heldout")
    recipe = load_recipe("tiny-transformer", extend.argv[2:-7])
    assert recipe.model.attention is not None
    assert recipe.model.attention.positions == "none"
    assert (recipe.train.seq_len, recipe.train.batch_size, recipe.optim.lr) == (256, 1, 1e-3)


@pytest.mark.parametrize(("changes", "message"), [
    (["extend=[{name='a',recipes=['tiny-mamba'],factors=[2]}]"], "extend 'a' names the recipe 'tiny-mamba'"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[3]}]"], "batches of 4 sequences, which 3 does not divide"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[8]}]"], "batches of 4 sequences, which 8 does not divide"),
    (["eval.lengths=[64,128]"], "eval.lengths lacks 256"),
    (["eval.lengths=[64,96,128,256]"], "eval.lengths has 96, which does not divide 256"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[2],overrides={'init.from'='x'}}]"],
     "overrides may not set init.from"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[2],overrides={train={seq_len=9}}}]"],
     "overrides may not set train.seq_len"),
    (["eval.tasks=['heldout']"], 'needs the task "window-loss"'),
    (["extend=[]"], r"\[extension\] has no effect without \[\[extend\]\]"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[2],overrides={'train.seq_len'=9}}]"],
     "overrides may not set train.seq_len"),
    (["extend=[{name='a',recipes=['tiny-hybrid'],factors=[2],overrides={'train.sqe_len'=9}}]"],
     "unknown key train.sqe_len"),
    (["extend=[{name='a',recipes=['tiny-hybrid','tiny-hybrid'],factors=[2]}]"], "two extensions would write"),
])
def test_extensions_that_cannot_be_made_are_refused_before_anything_runs(
        file: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(file, tmp_path, *changes)


def test_extensions_need_to_be_told_how_long_they_train(file: Path, tmp_path: Path) -> None:
    file.write_text(STUDY.replace("[extension]\nsteps = 10\nwarmup_share = 0.5\n", ""))
    with pytest.raises(ConfigError, match=r"has \[\[extend\]\] and no section \[extension\]"):
        plan_of(file, tmp_path)


def test_a_folder_may_gain_seeds_and_methods_and_nothing_else(file: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "study")
    claim = lambda *changes: claim_folder(  # noqa: E731
        config := load_study(file, changes), load_recipes(config), layout)
    claim("seeds=[1]")
    claim("seeds=[1,2]")
    text = file.read_text()
    file.write_text(text + '[[extend]]\nname = "more"\nrecipes = ["tiny-hybrid"]\nfactors = [2]\n')
    claim()
    file.write_text(text)
    with pytest.raises(ConfigError, match="differs: extend was"):
        claim()
    file.write_text(text + '[[extend]]\nname = "more"\nrecipes = ["tiny-hybrid"]\nfactors = [2]\n')
    with pytest.raises(ConfigError, match=r"seeds was \[1, 2\] and is now \[2\]"):
        claim("seeds=[2]")
    with pytest.raises(ConfigError, match=r"seeds was \[1, 2\] and is now \[3, 1, 2\]"):
        claim("seeds=[3,1,2]")
    with pytest.raises(ConfigError, match=r"extension.steps was 10 and is now 11"):
        claim("extension.steps=11")


def finish(job: Any, config: Any, steps: int, checkpoint: bool) -> None:
    """What a training and its evaluation leave."""
    run = Run(job.run)
    run.path.mkdir(parents=True)
    run.log({"step": steps, "loss": 1.0})
    for task in config.eval.tasks:
        run.save_rows(task, [])
        (run.path / "evals").mkdir(exist_ok=True)
        (run.path / "evals" / f"{task}.json").write_text(json.dumps({"key": {"samples": 4}}))
    if checkpoint:
        (run.checkpoints / f"step-{steps:08d}").mkdir(parents=True)


def test_a_base_without_its_checkpoint_is_done_when_no_extension_needs_it(file: Path, tmp_path: Path) -> None:
    config = load_study(file)
    _, bases, longer = plan_of(file, tmp_path)
    base = bases.chains[0][0]
    finish(base, config, 400, checkpoint=True)
    assert base.done()
    shutil.rmtree(base.run / "checkpoints")
    assert not base.done()
    mine = [chain for chain in longer.chains if "tiny-transformer-s1" in chain[0].name]
    for chain in mine:
        finish(chain[0], config, 10, checkpoint=False)
        assert chain[0].done()
        assert chain[1].done()
    assert base.done()
    # records that end early are of a training that did not
    (mine[0][0].run / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    assert not mine[0][0].done()
    # trained again it would not be what the others went on from
    with pytest.raises(RunError, match=r"the checkpoint of .*tiny-transformer-s1 is gone, .* Bring it back, or remove"):
        base.done()
    for chain in mine:
        shutil.rmtree(chain[0].run)
    assert not base.done()


def test_an_extension_of_other_weights_than_its_base_has_now_is_told(file: Path, tmp_path: Path) -> None:
    config = load_study(file)
    _, bases, longer = plan_of(file, tmp_path)
    base, extend = bases.chains[0][0], longer.chains[0][0]
    finish(base, config, 400, checkpoint=True)
    meta = base.run / "checkpoints" / "step-00000400" / "meta.json"
    meta.write_text(json.dumps({"files": {"model": "a" * 64}}))
    finish(extend, config, 10, checkpoint=False)
    Run(extend.run).write_env({"init": {"weights": weights_print({"files": {"model": "a" * 64}})}}, resumed=False)
    assert extend.done()
    meta.write_text(json.dumps({"files": {"model": "b" * 64}}))
    with pytest.raises(RunError, match=r"plain-2x went on from other weights than .*tiny-transformer-s1 has now"):
        extend.done()


def test_tables_of_overrides_are_read_as_their_keys_are(file: Path, tmp_path: Path) -> None:
    nested = "extend=[{name='a',recipes=['tiny-hybrid'],factors=[2],overrides={optim={lr=2e-3}}}]"
    assert "optim.lr=0.002" in plan_of(file, tmp_path, nested)[2].chains[0][0].argv


def extension() -> Extension:
    return Extension(load_recipe("tiny-hybrid"), "plain", 2, ())


def test_gains_and_losses_are_differences_to_the_base_of_the_seed() -> None:
    def rows(short: float, long: float, book: float, copy: float) -> list[dict[str, Any]]:
        made = [row("window_loss", "h", value, "nats/token", shape=f"length={length} sequences=2")
                for length, value in ((256, short), (512, long))]
        made += [row("phonebook.exact", "h", value, "share", shape=f"form={form} length={length}")
                 for length, value in ((128, 1.0), (512, book)) for form in ("standard", "reversed")]
        return [*made, row("copy.accuracy", "h", copy, "share", shape="length=512"),
                row("mqar.accuracy", "h", 0.5, "share", shape="pairs=4 length=12")]

    found = {r["what"]: r for r in extended_rows(extension(), rows(3.0, 5.0, 0.0, 0.0), rows(3.125, 2.5, 0.75, 0.25))}
    assert found["extended.gained"]["value"] == 0.5
    assert found["extended.lost"]["value"] == 0.125
    assert found["extended.long_recall"]["value"] == 0.5
    assert found["extended.short_recall"]["value"] == 0.0
    assert found["extended.window_loss"]["shape"] == "length=512 sequences=2 method=plain factor=2"


def test_the_shipped_study_extends_every_family_that_it_trains() -> None:
    config = load_study("long-context")
    assert {name for method in config.extend for name in method.recipes} == set(config.recipes)
    assert {factor for method in config.extend for factor in method.factors} == {4, 8}
    assert load_extensions(config, load_recipes(config))


def test_the_shipped_study_for_a_gpu_is_the_papers_comparison() -> None:
    config = load_study("mini")
    recipes = load_recipes(config)
    assert [name.removeprefix("50m-") for name in recipes] == ["transformer", "mamba", "mamba2", "hybrid"]
    assert len(config.seeds) == 2
    found = [counts.parameters(recipe.model).non_embedding for recipe in recipes.values()]
    assert max(found) / min(found) <= 1.02
    assert min(found) > 30e6
    assert max(found) < 60e6
    assert {"heldout", "phonebook", "mqar", "copy", "choice-cloze", "choice-letter"} <= set(config.eval.tasks)
    assert (config.eval.ruler_lengths, config.eval.max_length) == ([1024, 2048, 4096], 4096)
    extended = load_extensions(config, recipes)
    assert {(one.base.name, one.length) for one in extended} == {(name, 4096) for name in recipes}
