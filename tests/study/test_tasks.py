"""What a study may ask: names and options are those of `hinny eval`, what cannot act is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hinny.config import Recipe
from hinny.errors import ConfigError
from hinny.evals.made import MadeTask
from hinny.evals.options import EvalOptions
from hinny.evals.suites import choose
from hinny.evals.suites import table as registry
from hinny.run import Run, row, write_atomically
from hinny.study import tasks
from hinny.study.config import StudyConfig, load_extensions, load_recipes, load_study
from hinny.study.done import checkpoint
from hinny.study.folder import claim_folder
from hinny.study.plan import Job, Layout, stages
from hinny.study.tasks_figures import HEADLINES

ASKED = ["eval.tasks=['heldout','mqar','choice-letter','induction','ruler-vt','ruler-fwe']",
         "eval.ruler_lengths=[512,1024]", "eval.max_length=1024"]


def test_a_study_may_ask_every_task_of_the_registry_that_is_made_without_data() -> None:
    known = registry()
    made = {name for name, entry in known.items() if type(entry) is MadeTask and not entry.needs()}
    # these need prompts of thousands of tokens, and have a counterpart of tokens
    assert made - {"phonebook-standard", "phonebook-reversed", "phonebook-jelassi"} == tasks.MADE
    assert set(tasks.TASKS) <= known.keys()
    for name in tasks.RECALL:
        assert HEADLINES.get(name, "exact") == known[name].metrics[0], name


def test_every_option_acts_on_the_tasks_that_the_study_believes() -> None:
    for option, acting in tasks.ACTS_ON.items():
        name = option.removeprefix("--").replace("-", "_")
        assert {task for task in tasks.TASKS if name in registry()[task].uses} == acting, option


def asking(file: Path, *overrides: str) -> tuple[StudyConfig, dict[str, Recipe]]:
    config = load_study(file, overrides)
    return config, load_recipes(config)


def chain(config: StudyConfig, recipes: dict[str, Recipe], root: Path) -> list[Job]:
    return stages(config, recipes, Layout(root), cores=2)[1].chains[0]


def test_ruler_is_asked_in_a_command_of_its_own_at_its_own_lengths(study_file: Path, tmp_path: Path) -> None:
    train, evaluate, ruler = chain(*asking(study_file, *ASKED), tmp_path)
    assert [job.name for job in (train, evaluate, ruler)] == [
        "train tiny-transformer s1", "eval tiny-transformer s1", "eval ruler tiny-transformer s1"]
    run = str(tmp_path / "runs" / "tiny-transformer-s1")
    assert evaluate.argv == (
        "eval", run, "heldout", "mqar", "choice-letter", "induction", "--samples", "64", "--lengths",
        "64,96,128,192,256,320,384,512", "--pairs", "4,8,16,32", "--windows", "128", "--max-length", "1024",
        "--threads", "1")
    assert ruler.argv == ("eval", run, "ruler-vt", "ruler-fwe", "--lengths", "512,1024", "--samples", "64",
                          "--max-length", "1024", "--threads", "1")


@pytest.mark.parametrize("asked", [
    ASKED, ["eval.tasks=['choice-cloze']"], ["eval.tasks=['heldout']"], ["eval.tasks=['mqar','choice-text']"],
    ["eval.tasks=['ruler-cwe']", "eval.ruler_lengths=[256]"]])
def test_hinny_eval_takes_every_option_that_a_study_gives(study_file: Path, asked: list[str]) -> None:
    for one in tasks.askings(load_study(study_file, asked).eval):
        given: dict[str, Any] = {}
        for option, value in one.options.items():
            name = option.removeprefix("--").replace("-", "_")
            given[name] = tuple(map(int, value.split(","))) if name in ("lengths", "pairs") else int(value)
        EvalOptions(**given).check_used({entry.entry.name: entry.entry.uses for entry in choose(one.tasks)})


@pytest.mark.parametrize(("overrides", "message"), [
    (["eval.tasks=['ruler-tv']"], "eval.tasks: 'ruler-tv' is not a task that a study asks. Did you mean ruler-vt"),
    (["eval.tasks=['winogrande']"], "'winogrande' is not a task that a study asks"),
    (["eval.tasks=['ruler-vt']"], "eval: ruler_lengths is missing: tasks names ruler-vt"),
    (["eval.ruler_lengths=[512]"], "eval: ruler_lengths has no effect: tasks names no task of RULER"),
    (["eval.max_length=512"], "eval: max_length has no effect on heldout, phonebook, mqar, copy"),
    (["eval.tasks=['mqar','mqar']"], "mqar is named twice"),
    (["eval.tasks=['ruler-vt']", "eval.ruler_lengths=[0]"], "eval.ruler_lengths.0 is 0"),
    (["eval.tasks=['ruler-vt']", "eval.ruler_lengths=[256,512]"],
     "eval.ruler_lengths has 512, at which ruler-vt is asked, and tiny-transformer, which has rotary positions, was "
     "trained on 256 tokens. Set eval.max_length = 512"),
    (["eval.tasks=['induction']"], "eval.lengths has 512, at which induction is asked"),
    (["eval.tasks=['ruler-vt']", "eval.ruler_lengths=[1024]", "eval.max_length=512"],
     "eval.max_length allows 512 tokens"),
])
def test_tasks_that_cannot_be_asked_are_refused_before_anything_runs(
        study_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        asking(study_file, *overrides)
    assert message in str(refusal.value)


def test_models_without_positions_are_asked_past_their_training_without_a_limit(study_file: Path) -> None:
    alone = ["recipes=['tiny-mamba2']", "eval.tasks=['ruler-vt']", "eval.ruler_lengths=[4096]"]
    assert asking(study_file, *alone)[0].eval.max_length is None


def test_an_extended_model_is_held_against_what_it_was_extended_to(study_file: Path) -> None:
    longer = ["extend=[{name='plain',recipes=['tiny-transformer'],factors=[2]}]", "extension.steps=10",
              "extension.warmup_share=0.5", "eval.tasks=['window-loss','ruler-vt']", "eval.lengths=[256,512]"]
    config, recipes = asking(study_file, *longer, "eval.ruler_lengths=[256]")
    assert len(load_extensions(config, recipes)) == 1
    with pytest.raises(ConfigError, match=r"ruler_lengths has 512.*trained on 256"):
        asking(study_file, *longer, "eval.ruler_lengths=[512]")


def write_records(run: Path, config: StudyConfig, **options: Any) -> None:
    """Results and records as `hinny eval` writes them, without a figure."""
    for task in config.eval.tasks:
        Run(run).save_rows(task, [])
        lengths = config.eval.ruler_lengths if task in tasks.RULER else config.eval.lengths
        record = {"key": {"version": "1", "samples": config.eval.samples}, "units": [],
                  "options": {"samples": config.eval.samples, "lengths": lengths} | options}
        write_atomically(run / "evals" / f"{task}.json", json.dumps(record))


@pytest.mark.parametrize("by_hand", [{"lengths": [2048]}, {"seed": 7}, {"ruler_version": "2024-06"},
                                     {"truncate": "left"}])
def test_ruler_asked_by_hand_is_not_taken_for_the_studys(
        study_file: Path, tmp_path: Path, by_hand: dict[str, Any]) -> None:
    config, recipes = asking(study_file, "eval.tasks=['mqar','ruler-vt']", *ASKED[1:])
    train, evaluate, ruler = chain(config, recipes, tmp_path)
    assert train.run is not None
    checkpoint(train.run, recipes["tiny-transformer"]).mkdir(parents=True)
    write_records(train.run, config)
    assert (evaluate.done(), ruler.done()) == (True, True)
    write_records(train.run, config, **by_hand)
    assert not ruler.done()


def test_tasks_may_be_added_to_a_study_that_was_begun_and_taken_away(study_file: Path, tmp_path: Path) -> None:
    claim_folder(*asking(study_file), Layout(tmp_path))
    more = ["eval.tasks=['heldout','phonebook','mqar','copy','choice-letter','ruler-vt']", "eval.max_length=512"]
    claim_folder(*asking(study_file, *more, "eval.ruler_lengths=[256]"), Layout(tmp_path))
    claim_folder(*asking(study_file, *more, "eval.ruler_lengths=[256,512]"), Layout(tmp_path))
    claim_folder(*asking(study_file), Layout(tmp_path))
    with pytest.raises(ConfigError, match=r"eval\.tasks was"):
        claim_folder(*asking(study_file, "eval.tasks=['heldout','phonebook']"), Layout(tmp_path))
    with pytest.raises(ConfigError, match=r"eval\.samples was 64 and is now 8"):
        claim_folder(*asking(study_file, *more[:1], "eval.ruler_lengths=[256]", "eval.samples=8"), Layout(tmp_path))


def made(task: str, length: int, value: float, n: int = 10) -> dict[str, Any]:
    shape = f"length={length} n={n} shots=0 version=head-1"
    return {**row(f"{task}.string_match_all", "m", value, "share", shape=shape), "command": f"hinny eval {task}"}


def test_rulers_mean_is_over_all_its_tasks_or_there_is_none(study_file: Path) -> None:
    config = load_study(study_file, ["eval.tasks=['ruler-vt','ruler-fwe']", "eval.ruler_lengths=[256,512,1024]"]).eval
    rows = [made("ruler-vt", 512, 0.5), made("ruler-fwe", 512, 0.25), made("ruler-fwe", 256, 1.0),
            made("ruler-cwe", 512, 1.0), made("ruler-vt", 2048, 1.0), made("ruler-fwe", 2048, 1.0)]
    (mean,) = tasks.ruler_means(config, rows)
    assert (mean["what"], mean["value"], mean["shape"]) == ("ruler.mean", 0.375, "length=512 tasks=2 n=20")
    assert mean["command"] == "hinny eval ruler-vt\nhinny eval ruler-fwe"
    assert (mean["low"], mean["high"]) == (None, None)


def test_what_the_study_does_not_ask_is_not_collected(study_file: Path) -> None:
    config = load_study(study_file, ["eval.tasks=['ruler-vt','choice-letter']", "eval.ruler_lengths=[512]"]).eval
    letter = {**made("x", 1, 0.5), "what": "choice-letter.acc", "shape": "n=8 shots=2 version=1"}
    kept = [made("ruler-vt", 512, 0.5), letter, row("held_out_loss", "m", 4.0, "nats/token", shape="windows=4")]
    other = [made("ruler-vt", 1024, 0.5), made("ruler-cwe", 512, 0.5), {**letter, "what": "choice-text.acc"}]
    assert tasks.study_rows(config, [*kept, *other]) == kept
