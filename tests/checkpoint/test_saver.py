"""One process saves while it trains: what is written is what was there at the start, and errors are told."""

import threading

import pytest
import torch
from sharded_models import EXTRA, RECIPE, adam, advance, built, contents, differ, trained

from hinny.checkpoint import Saver, latest, load, read_meta, store
from hinny.errors import CheckpointError
from hinny.run import Run


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.write_recipe(RECIPE)
    return run


@pytest.fixture
def gate(monkeypatch):
    """Holds every save before its first byte until it is set."""
    gate, shards = threading.Event(), store._write_shards

    def held(*args):
        assert gate.wait(60)
        return shards(*args)

    monkeypatch.setattr(store, "_write_shards", held)
    return gate


def test_training_and_what_is_said_of_it_may_change_while_the_checkpoint_is_written(run, gate):
    model, optimizer = trained(built(0), 2)
    at_start, extra = contents(model, optimizer), dict(EXTRA)
    with Saver(run) as saver:
        assert saver.done
        saver.start(2, model, optimizer, extra)
        assert not saver.done
        assert saver.poll(saver.done) is None
        advance(model, optimizer, 3)
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        extra["tokens"] = -1
        assert latest(run) is None
        gate.set()
        assert saver.wait() == latest(run)
        assert (saver.done, saver.wait()) == (True, None)
    loaded = built(1)
    filled = adam(loaded)
    assert load(run, loaded, filled)["tokens"] == EXTRA["tokens"]
    assert differ(contents(loaded, filled), at_start) == []


def test_the_next_save_waits_for_the_one_before_and_has_its_own_state(run):
    model, optimizer = trained(built(0), 1)
    with Saver(run) as saver:
        for step in (1, 2, 3):
            saver.start(step, model, optimizer, EXTRA, keep=step == 1)
            at_start = contents(model)
            advance(model, optimizer)
    assert [path.name for path in run.checkpoint_folders()] == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert read_meta(run, 1)["kept"]
    loaded = built(1)
    load(run, loaded)
    assert differ(contents(loaded), at_start) == []


def test_an_error_of_the_thread_is_raised_once_where_the_saver_is_asked(run, monkeypatch):
    model, optimizer = trained(built(0), 1)
    saver = Saver(run)
    saver.start(1, model, optimizer, EXTRA)
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_synced", full)
    for ask in (saver.wait, lambda: saver.poll(True), lambda: saver.start(3, model, optimizer, EXTRA)):
        saver.start(2, model, optimizer, EXTRA)
        with pytest.raises(CheckpointError, match=r"step 2 .*: No space left on device\. .*is step-00000001"):
            ask()
        assert saver.poll(True) is None
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    with saver:
        saver.start(2, model, optimizer, EXTRA)
    assert latest(run).name == "step-00000002"


def test_what_ends_training_is_raised_and_a_save_that_failed_with_it_is_logged(run, monkeypatch, caplog):
    model, optimizer = trained(built(0), 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_synced", full)
    def session(fails):
        with Saver(run) as saver:
            saver.start(1, model, optimizer, EXTRA)
            assert not fails, "the training's own"

    with pytest.raises(AssertionError, match="the training's own"):
        session(fails=True)
    assert "No space left on device" in caplog.text
    with pytest.raises(CheckpointError, match="No space left"):
        session(fails=False)
