"""A run directory loses nothing and says what made its figures."""

import json
import os
import platform
import subprocess
import sys

import pytest

import hinny
from hinny import run as runs
from hinny.config import Recipe, validate
from hinny.errors import RunError
from hinny.run import Run, row

RECIPE = {
    "name": "tiny", "description": "one MLP",
    "model": {"pattern": "-", "d_model": 8, "vocab_size": 257, "norm": "rmsnorm", "norm_eps": 1e-5,
              "tie_embeddings": False, "init_std": 0.02, "mlp": {"d_ff": 16, "activation": "gelu"}},
    "data": {"boundaries": "reset"},
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_samples": 0, "weight_decay": 0.1, "beta1": 0.9,
              "beta2": 0.95, "eps": 1e-8},
    "train": {"seq_len": 16, "batch_size": 2, "micro_batch_size": 2, "steps": 4, "seed": 0, "precision": "fp32",
              "log_every": 1, "save_every": 2},
}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.write_recipe(validate(Recipe, RECIPE, "test"))
    return run


def test_the_recipe_comes_back_as_it_was_written(run):
    assert run.recipe == validate(Recipe, RECIPE, "test")


def test_a_directory_without_a_recipe_is_refused_with_a_reason(tmp_path):
    with pytest.raises(RunError, match=r"not a run directory.*recipe\.toml"):
        _ = Run(tmp_path).recipe


def test_metrics_come_back_in_order_and_floats_exactly(run):
    records = [{"step": i, "loss": 0.1 * i} for i in range(1, 4)]
    for record in records:
        run.log(record)
    assert run.metrics() == records


def test_a_line_torn_by_a_kill_is_dropped(run):
    run.log({"step": 1, "loss": 1.0})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert run.metrics() == [{"step": 1, "loss": 1.0}]
    run.keep_metrics(1)
    run.log({"step": 2, "loss": 2.0})
    assert [record["step"] for record in run.metrics()] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        run.metrics()


def test_records_past_the_step_are_dropped(run):
    for step in (1, 2, 3):
        run.log({"step": step})
    run.log({"step": 3, "held_out_loss": 1.0})
    run.keep_metrics(2)
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    assert [file.name for file in run.path.glob(".partial*")] == []


def test_a_value_that_is_not_a_number_is_never_logged(run):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"step": 1, "loss": float("nan")})
    assert run.metrics() == []


def test_a_run_in_use_is_refused_with_the_pid_of_its_holder(run):
    hold = f"from hinny.run import Run\nwith Run({str(run.path)!r}).lock():\n print('held', flush=True)\n input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"in use by another process \(pid {holder.pid}\)"), run.lock():
            pass
        holder.kill()
    with run.lock():  # a dead holder leaves no lock behind
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="cannot be used as a run directory"), Run(tmp_path / "run").lock():
        pass


def test_steps_done_counts_whole_checkpoints_only(run):
    assert (run.steps_done, run.finished) == (0, False)
    for name in ("step-00000002", ".partial-step-00000004", "step-00000009.bak"):
        (run.checkpoints / name).mkdir(parents=True)
    assert (run.steps_done, run.finished) == (2, False)
    (run.checkpoints / "step-00000004").mkdir()
    assert (run.steps_done, run.finished) == (4, True)


def test_rows_come_back_by_name_and_together(run):
    first, second = row("decode", "tiny", 10.0, "tokens/s"), row("held_out_loss", "tiny", 2.5, "nats/token", low=2.4)
    run.save_rows("generate", [first])
    run.save_rows("heldout", [second])
    assert run.rows("heldout") == [second]
    assert run.rows() == [first, second]
    run.save_rows("generate", [])
    assert run.rows() == [second]
    with pytest.raises(RunError, match="no results 'recall'; it has: generate, heldout"):
        run.rows("recall")


def test_a_row_has_exactly_the_fields_of_the_schema():
    made = row("prefill", "tiny", 1.0, "tokens/s", shape="context=256 batch=1", peer="transformers", peer_value=0.5,
               ratio=2.0, device="NVIDIA H100")
    assert list(made) == ["what", "variant", "shape", "value", "unit", "low", "high", "bound", "peer", "peer_value",
                          "ratio", "command", "commit", "machine"]
    assert "NVIDIA H100" in made["machine"]
    assert json.loads(json.dumps(made)) == made


def test_a_row_says_machine_and_commit_but_never_the_host(monkeypatch):
    runs.machine.cache_clear()
    made = row("prefill", "tiny", 1.0, "tokens/s")
    assert f"Python {platform.python_version()}" in made["machine"]
    assert "GiB" in made["machine"]
    assert platform.node() not in made["machine"]
    assert made["commit"]


def test_the_command_is_a_shell_line_without_the_program_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hinny", "train", "my recipe.toml"])
    assert runs.command_line() == "hinny train 'my recipe.toml'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/hinny/__main__.py", "show"])
    assert runs.command_line() == "python -m hinny show"


def test_the_commit_marks_changed_code_and_outside_git_is_the_version(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], check=True,
                       capture_output=True)

    def commit():
        runs.commit.cache_clear()
        return runs.commit()

    package = tmp_path / "hinny"
    package.mkdir()
    (package / "errors.py").write_text("")
    monkeypatch.setattr(runs, "PACKAGE", package)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    try:
        monkeypatch.delenv("HINNY_COMMIT", raising=False)
        outside = commit()
        monkeypatch.setenv("HINNY_COMMIT", "0123456789ab")
        copied = commit()
        monkeypatch.delenv("HINNY_COMMIT")
        git("init")
        installed_in_a_foreign_checkout = commit()
        git("add", ".")
        git("commit", "-m", "one")
        clean = commit()
        (package / "errors.py").write_text("changed")
        dirty = commit()
        monkeypatch.setenv("HINNY_COMMIT", "0123456789ab")
        told = commit()
    finally:
        runs.commit.cache_clear()
    assert outside == installed_in_a_foreign_checkout == hinny.__version__
    assert copied == told == "0123456789ab"
    assert len(clean) == 12
    assert clean != copied
    assert dirty == clean + "+changes"


def test_env_of_a_resumed_run_keeps_that_of_its_earlier_sessions(run):
    for threads in (2, 1, 4):
        run.write_env(runs.environment(device="cpu", seed=0, threads=threads, data_fingerprint="f"),
                      resumed=threads != 2)
    assert run.env["threads"] == 4
    assert [session["threads"] for session in run.env["earlier"]] == [2, 1]
    assert {"versions", "device", "seed", "data_fingerprint", "command", "commit", "machine"} <= set(run.env)


def test_the_run_directory_needs_no_torch():
    code = "import sys, hinny.run\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
