"""Records go to TensorBoard and Weights & Biases as they go to metrics.jsonl; stand-ins note what is asked of them."""

import signal
import sys
from types import SimpleNamespace

import pytest
from test_loop import stop_at

from hinny.errors import ConfigError
from hinny.train.loop import train


class TensorBoardStandIn:
    """`torch.utils.tensorboard`, as far as it is used."""

    def __init__(self):
        self.writers = []

    def SummaryWriter(self, log_dir, purge_step):
        writer = SimpleNamespace(log_dir=log_dir, purge_step=purge_step, scalars=[], closed=False)
        writer.add_scalar = lambda name, value, step: writer.scalars.append((step, name, value))
        writer.close = lambda: setattr(writer, "closed", True)
        self.writers.append(writer)
        return writer


class WandBStandIn:
    """`wandb`, as far as it is used."""

    def __init__(self):
        self.runs = []

    def init(self, **options):
        run = SimpleNamespace(options=options, defined=[], logged=[], finished=False)
        run.define_metric = lambda *names, **over: run.defined.append((*names, over))
        run.log = lambda record: run.logged.append(dict(record))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def tensorboard(monkeypatch):
    module = TensorBoardStandIn()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module


@pytest.fixture
def wandb(monkeypatch):
    module = WandBStandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_both_get_the_records_of_metrics_jsonl(recipe_of, data, tmp_path, tensorboard, wandb):
    recipe = recipe_of("-", steps=5, log_every=2, eval_every=4, loggers=["wandb", "tensorboard"])
    run = train(recipe, tmp_path / "run", data=data)
    records = run.metrics()
    assert len(records) == 5  # steps 2, 4, 5, and held-out losses of 4 and 5
    (board,), (online,) = tensorboard.writers, wandb.runs
    assert online.logged == records
    assert board.scalars == [(record["step"], name, value) for record in records
                             for name, value in record.items() if name != "step"]
    assert board.log_dir == str(run.path / "tensorboard")
    assert online.defined == [("*", {"step_metric": "step"})]
    assert online.options["config"] == run.recipe.model_dump(mode="json")
    assert (online.options["dir"], online.options["name"]) == (str(run.path), "run")
    assert board.closed
    assert online.finished


def test_a_resumed_run_goes_on_in_the_same_place(recipe_of, data, tmp_path, tensorboard, wandb):
    recipe = recipe_of("-", loggers=["tensorboard", "wandb"])
    train(recipe, tmp_path / "run", data=data, progress=stop_at(5, signal.SIGTERM))
    train(recipe, tmp_path / "run", data=data)
    first, second = wandb.runs
    assert first.finished
    assert first.options["id"] == second.options["id"]
    assert {run.options["resume"] for run in wandb.runs} == {"allow"}
    assert [writer.purge_step for writer in tensorboard.writers] == [1, 6]
    assert {step for step, *_ in tensorboard.writers[1].scalars} == set(range(6, 13))
    train(recipe_of("-", loggers=["wandb"]), tmp_path / "other", data=data)
    assert wandb.runs[2].options["id"] != first.options["id"]


def test_writers_are_closed_when_the_training_fails(recipe_of, data, tmp_path, tensorboard):
    def fail(now):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(recipe_of("-", loggers=["tensorboard"]), tmp_path / "run", data=data, progress=fail)
    assert tensorboard.writers[0].closed


def test_loggers_may_change_when_a_run_goes_on(recipe_of, data, tmp_path, tensorboard):
    train(recipe_of("-"), tmp_path / "run", data=data, progress=stop_at(5, signal.SIGTERM))
    assert train(recipe_of("-", loggers=["tensorboard"]), tmp_path / "run", data=data).finished
    assert tensorboard.writers[0].scalars


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_refused_with_what_to_install(recipe_of, data, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'train.loggers has "{name}".*pip install {name}'):
        train(recipe_of("-", loggers=[name]), tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()
