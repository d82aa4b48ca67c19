"""A trace holds the steps that were asked for, and changes nothing else."""

import json
import signal

import pytest
from test_loop import assert_same_run, stop_at

from hinny.errors import ConfigError, RunError
from hinny.train.loop import train


def events(file):
    return [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]


def test_a_trace_holds_the_steps_asked_for_and_the_run_stays_the_same(recipe_of, data, tmp_path):
    run = train(recipe_of("-", steps=6), tmp_path / "run", data=data, profile="3:4", threads=1)
    assert [file.name for file in (run.path / "profile").iterdir()] == ["steps-3-4.json"]
    found = events(run.path / "profile" / "steps-3-4.json")
    steps = {event["name"]: event for event in found if event["name"].startswith("step ")}
    assert set(steps) == {"step 3", "step 4"}
    products = [event for event in found if event["name"] == "aten::mm"]
    for step in steps.values():
        assert any(step["ts"] <= event["ts"] <= step["ts"] + step["dur"] for event in products)
    assert_same_run(run, train(recipe_of("-", steps=6), tmp_path / "plain", data=data, threads=1))
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_trace_that_is_cut_short_is_named_after_the_steps_it_has(recipe_of, data, tmp_path):
    run = train(recipe_of("-"), tmp_path / "run", data=data, profile="2:9", progress=stop_at(3, signal.SIGTERM))
    assert [file.name for file in (run.path / "profile").iterdir()] == ["steps-2-3.json"]
    train(recipe_of("-"), run.path, data=data, profile="4:4")
    assert {file.name for file in (run.path / "profile").iterdir()} == {"steps-2-3.json", "steps-4-4.json"}


@pytest.mark.parametrize("steps", ["0:2", "3:2", "2:13", "13:13", "3", "a:b", "1:2:3", "-1:3", ""])
def test_a_range_outside_the_run_is_refused(recipe_of, data, tmp_path, steps):
    with pytest.raises(ConfigError, match="steps 1 to 12 are still to be made"):
        train(recipe_of("-"), tmp_path / "run", data=data, profile=steps)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_steps_that_were_made_already_are_refused(recipe_of, data, tmp_path):
    train(recipe_of("-"), tmp_path / "run", data=data, progress=stop_at(5, signal.SIGTERM))
    with pytest.raises(ConfigError, match=r"profile is '5:6'.*steps 6 to 12 are still to be made"):
        train(recipe_of("-"), tmp_path / "run", data=data, profile="5:6")
    train(recipe_of("-"), tmp_path / "run", data=data)
    with pytest.raises(ConfigError, match="no step is left"):
        train(recipe_of("-"), tmp_path / "run", data=data, profile="5:6")


def test_a_folder_that_cannot_be_written_ends_the_run_with_its_name(recipe_of, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    with pytest.raises(RunError, match="profile cannot be written"):
        train(recipe_of("-"), tmp_path / "run", data=data, profile="2:3")
