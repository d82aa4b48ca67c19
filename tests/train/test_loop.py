"""A run goes on from where it stopped, bit for bit, and loses nothing to a bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from hinny import tokenizer
from hinny.checkpoint import load_model
from hinny.config import to_toml
from hinny.data.mix import Stream
from hinny.data.prepare import prepare
from hinny.errors import CheckpointError, ConfigError, RunError, TrainingError
from hinny.model import Model
from hinny.run import Run
from hinny.train import session
from hinny.train.loop import train


def losses(run):
    """All of the records that don't depend on the clock."""
    clock = ("tokens_per_s", "data_seconds", "seconds")
    return [{k: v for k, v in record.items() if k not in clock} for record in run.metrics()]


def weights(run):
    return load_model(run).state_dict()


def assert_same_run(ours, theirs):
    assert losses(ours) == losses(theirs)
    for name, expected in weights(theirs).items():
        assert torch.equal(weights(ours)[name], expected), name


def stop_at(step, number):
    """A progress callback that sends this process a signal after `step`."""
    def progress(now):
        if now["step"] == step:
            os.kill(os.getpid(), number)
    return progress


KILLED = """
import os, signal, sys, time
from hinny.checkpoint import store
from hinny.config import load_recipe
from hinny.train.loop import train

recipe, out, data, moment, step = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def progress(now):
    if now["step"] == int(step):
        if moment == "step":
            while not os.path.exists(os.path.join(out, "checkpoints", "step-00000004")):  # saved beside the training
                time.sleep(0.01)
            die()
        store.write_synced = die

train(load_recipe(recipe), out, data=data, threads=1, progress=progress)
"""


def test_a_run_killed_twice_ends_as_if_it_was_never_killed(recipe_of, data, tmp_path):
    """SIGKILL between two checkpoints, then in the next session when a checkpoint is half written: all four kinds of
    layer, bf16, and synthetic sequences among the text. Records past the last whole checkpoint are in the metrics.
    """
    recipe = recipe_of("1M*-", eval_every=6, precision="bf16",
                       synthetic={"share": 0.5, "tasks": {"mqar": 1, "copy": 2}})
    (tmp_path / "tiny.toml").write_text(to_toml(recipe))
    killed = Run(tmp_path / "killed")

    def die(moment, step):
        arguments = [str(tmp_path / "tiny.toml"), str(killed.path), data, moment, str(step)]
        assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -signal.SIGKILL

    die("step", 6)
    assert [p.name for p in killed.checkpoints.iterdir()] == ["step-00000004"]
    assert killed.metrics()[-1]["step"] > 4
    die("save", 7)
    assert sorted(p.name for p in killed.checkpoints.iterdir()) == [".partial-step-00000008", "step-00000004"]
    assert killed.metrics()[-1]["step"] >= 8
    with open(killed.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # torn, as by a kill in the write
    assert train(recipe, killed.path, data=data, threads=1).finished
    assert_same_run(killed, train(recipe, tmp_path / "whole", data=data, threads=1))
    assert list(killed.checkpoints.glob(".partial*")) == []
    assert len(killed.env["earlier"]) == 2  # the killed sessions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_and_the_same_call_goes_on(recipe_of, data, tmp_path, number):
    recipe = recipe_of("1-", steps=8)
    before = signal.getsignal(number)
    run = train(recipe, tmp_path / "run", data=data, progress=stop_at(3, number))
    assert (run.finished, run.steps_done) == (False, 3)
    assert signal.getsignal(number) is before
    run = train(recipe, tmp_path / "run", data=data)
    assert run.finished
    assert_same_run(run, train(recipe, tmp_path / "whole", data=data))


def test_a_finished_run_is_left_as_it_is(recipe_of, data, tmp_path, caplog):
    recipe = recipe_of("-")
    run = train(recipe, tmp_path / "run", data=data)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.name != ".lock" and file.is_file()}
    with caplog.at_level("INFO", logger="hinny"):
        assert train(recipe, tmp_path / "run", data=data).finished
    assert "is finished: step 12 of 12" in caplog.text
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_training_lowers_the_held_out_loss(recipe_of, data, tmp_path):
    run = train(recipe_of("M-", steps=40, eval_every=20, save_every=40), tmp_path / "run", data=data)
    first, last = [record["held_out_loss"] for record in run.metrics() if "held_out_loss" in record]
    assert last < first < 5.55  # log(257), the loss of knowing nothing
    assert run.metrics()[39]["loss"] < 3.5


def test_metrics_and_progress_say_where_the_run_is(recipe_of, data, tmp_path):
    seen = []
    run = train(recipe_of("-", steps=5, log_every=2), tmp_path / "run", data=data, progress=seen.append)
    assert [now["step"] for now in seen] == [1, 2, 3, 4, 5]
    assert set(seen[0]) == {"step", "steps", "loss", "tokens_per_s", "seconds_left"}
    assert seen[-1]["seconds_left"] == 0
    records = run.metrics()
    assert [(record["step"], record["tokens"]) for record in records] == [(2, 256), (4, 512), (5, 640)]
    assert set(records[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "data_seconds",
                               "seconds"}
    assert records[0]["loss"] == seen[1]["loss"]


def test_records_and_progress_have_mfu_and_memory_where_the_device_is_known(recipe_of, data, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "seconds_at_peak", lambda recipe, accelerator: 2.0 ** -40)
    monkeypatch.setattr(session, "peak_memory", lambda device: {"peak_memory_bytes": 123})
    seen = []
    run = train(recipe_of("-", steps=3), tmp_path / "run", data=data, progress=seen.append)
    for now in (*seen, *run.metrics()):
        assert now["mfu"] == now["tokens_per_s"] * 2.0 ** -40
        assert now["peak_memory_bytes"] == 123


def test_the_seconds_that_a_step_waits_for_its_batch_are_told(recipe_of, data, tmp_path, monkeypatch):
    batch = Stream.batch

    def slow(self, step, rows=None):
        time.sleep(0.5 if step == 3 else 0.0)  # longer than the steps in which it is made ahead
        return batch(self, step, rows)

    monkeypatch.setattr(Stream, "batch", slow)
    run = train(recipe_of("-", steps=4, log_every=2), tmp_path / "run", data=data)
    quick, waited = [record["data_seconds"] for record in run.metrics()]
    assert waited >= 0.1  # the mean of two steps
    assert quick < waited
    assert sum(2 * record["data_seconds"] for record in run.metrics()) < run.metrics()[-1]["seconds"]


def test_the_z_loss_is_recorded_apart_from_the_loss_and_changes_the_run(recipe_of, data, tmp_path):
    plain = train(recipe_of("-", steps=3), tmp_path / "plain", data=data).metrics()
    with_z = train(recipe_of("-", steps=3, optim={"z_loss": 0.1}), tmp_path / "z", data=data).metrics()
    assert all("z_loss" not in record for record in plain)
    assert with_z[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert with_z[0]["z_loss"] == pytest.approx(0.1 * math.log(257) ** 2, rel=1e-2)  # logits near 0 at the start
    assert with_z[2]["z_loss"] < with_z[0]["z_loss"]
    assert with_z[2]["loss"] != plain[2]["loss"]


@pytest.mark.parametrize(("seconds", "steps"), [(1e-9, [1, 2, 3, 4, 5]), (1e9, [4, 5])])
def test_records_are_made_by_seconds_too(recipe_of, data, tmp_path, seconds, steps):
    run = train(recipe_of("-", steps=5, log_every=4, log_seconds=seconds), tmp_path / "run", data=data)
    assert [record["step"] for record in run.metrics()] == steps


def saved_steps(run):
    return [int(folder.name.removeprefix("step-")) for folder in run.checkpoint_folders()]


def test_every_so_many_steps_a_checkpoint_stays_beside_the_last_two(recipe_of, data, tmp_path):
    recipe = recipe_of("-", save_every=1, keep_every=4)
    assert saved_steps(train(recipe, tmp_path / "run", data=data)) == [4, 8, 11, 12]
    assert saved_steps(train(recipe_of("-", save_every=1), tmp_path / "other", data=data)) == [11, 12]


def test_what_was_kept_for_ever_stays_when_the_setting_changes(recipe_of, data, tmp_path):
    run = train(recipe_of("-", save_every=1, keep_every=2), tmp_path / "run", data=data,
                progress=stop_at(5, signal.SIGTERM))
    assert saved_steps(run) == [2, 4, 5]
    (run.checkpoints / "step-00000002" / "meta.json").write_text("damaged")
    assert saved_steps(train(recipe_of("-", save_every=1), run.path, data=data)) == [2, 4, 11, 12]
    assert load_model(run, step=4)


def test_a_run_directory_says_all_that_a_figure_depends_on(recipe_of, data, tmp_path):
    recipe = recipe_of("-")
    run = train(recipe, tmp_path / "run", data=data)
    with open(f"{data}/data.json") as file:
        facts = json.load(file)
    assert run.env["seed"] == 0
    assert run.env["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(run.env["data_fingerprint"]) == 64
    assert run.recipe.data.path == data
    assert run.recipe.model == recipe.model
    assert tokenizer.load(run.path).fingerprint == tokenizer.load(data).fingerprint
    assert json.loads((run.path / "data.json").read_text()) == facts


def test_a_changed_recipe_is_refused_with_every_key_but_cadence_may_change(recipe_of, data, tmp_path):
    train(recipe_of("-"), tmp_path / "run", data=data, progress=stop_at(2, signal.SIGTERM))
    with pytest.raises(CheckpointError) as caught:
        train(recipe_of("-", optim={"lr": 0.5}, seed=7), tmp_path / "run", data=data)
    for part in ("optim.lr: 0.01 → 0.5", "train.seed: 0 → 7", "another run directory, or restore the value"):
        assert part in str(caught.value)
    assert train(recipe_of("-", log_every=3, save_every=5), tmp_path / "run", data=data).finished


def test_changed_data_are_refused(recipe_of, data, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"another document {number} " * 20)
    prepare(tmp_path / "other", text=[tmp_path / "text"], tokenizer=f"{data}/tokenizer.json", held_out=0.2)
    train(recipe_of("-"), tmp_path / "run", data=data, progress=stop_at(2, signal.SIGTERM))
    with pytest.raises(CheckpointError, match="are not those of the checkpoint"):
        train(recipe_of("-"), tmp_path / "run", data=str(tmp_path / "other"))


def test_data_that_moved_are_the_same_data(recipe_of, data, tmp_path):
    train(recipe_of("-"), tmp_path / "run", data=data, progress=stop_at(2, signal.SIGTERM))
    (tmp_path / "moved").symlink_to(data)
    assert train(recipe_of("-"), tmp_path / "run", data=str(tmp_path / "moved")).finished


def test_a_loss_that_is_not_finite_names_step_batch_and_last_good_checkpoint(recipe_of, data, tmp_path, monkeypatch):
    recipe = recipe_of("-", save_every=2)
    stepped = []

    def poison(now):
        stepped.append(now["step"])
        if now["step"] == 3:
            monkeypatch.setattr(Model, "hidden", lambda *args, **kwargs: hidden(*args, **kwargs) * float("inf"))

    hidden = Model.hidden
    claim = r"(?s)step 4: the loss is nan.*Its batch: .*good checkpoint: .*step-00000002"
    with pytest.raises(TrainingError, match=claim):
        train(recipe, tmp_path / "run", data=data, progress=poison)
    monkeypatch.undo()
    assert stepped == [1, 2, 3]
    assert train(recipe, tmp_path / "run", data=data).finished
    assert_same_run(Run(tmp_path / "run"), train(recipe, tmp_path / "whole", data=data))


def test_missing_data_are_refused_with_the_fix(recipe_of, tmp_path):
    with pytest.raises(ConfigError, match="--data DIR"):
        train(recipe_of("-"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused(recipe_of, data, tmp_path):
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match=f"pid {os.getpid()}"):
        train(recipe_of("-"), run.path, data=data)


def test_resume_never_refuses_a_directory_with_a_checkpoint(recipe_of, data, tmp_path):
    train(recipe_of("-"), tmp_path / "run", data=data, resume="never")
    with pytest.raises(RunError, match="checkpoint of step 12"):
        train(recipe_of("-"), tmp_path / "run", data=data, resume="never")


def test_threads_are_set_for_the_run_and_restored(recipe_of, data, tmp_path):
    before = torch.get_num_threads()
    seen = []
    run = train(recipe_of("-", steps=2), tmp_path / "run", data=data, threads=before + 1,
                progress=lambda now: seen.append(torch.get_num_threads()))
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before
    assert run.env["threads"] == before + 1
    with pytest.raises(ConfigError, match="at least 1"):
        train(recipe_of("-"), tmp_path / "other", data=data, threads=0)
