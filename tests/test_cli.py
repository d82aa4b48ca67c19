"""The command line: every verb works, and a user's mistake gets one message and a non-zero exit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hinny.cli import main
from hinny.run import Run


def hinny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["hinny", *arguments])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: hinny(capsys, monkeypatch, *map(str, arguments))


def test_show_prints_exact_figures_as_json(run) -> None:
    code, out, _ = run("show", "recipes/8b-hybrid.toml", "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == 8_654_517_248


def test_show_predicts_at_the_share_of_the_peak_asked_for(run) -> None:
    found = [json.loads(run("show", "8b-hybrid", "--json", *share)[1])["predictions"]
             for share in ((), ("--mfu", "0.3"), ("--mfu", "0.45"))]
    assert found[0] == found[1]
    assert found[2]["assumptions"]["mfu"] == found[2]["prefill"][0]["mfu"] == 0.45
    assert found[2]["training_tokens_per_s_per_device"] == pytest.approx(
        1.5 * found[0]["training_tokens_per_s_per_device"])


def test_a_recipe_in_a_folder_is_shown_by_its_name(run) -> None:
    code, out, _ = run("show", "long/8b-hybrid-128k", "--json")
    assert code == 0
    assert (json.loads(out)["name"], json.loads(out)["flops_length"]) == ("8b-hybrid-128k", 131_072)


def test_show_pattern_allocates(run) -> None:
    code, out, _ = run("show", "--pattern", "--layers", 12, "--attention-ratio", 0.08, "--mlp-ratio", 0.5)
    assert code == 0
    assert "M-M-M-*-M-M-" in out


def test_a_run_goes_from_text_to_text(run, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"this is document {i}, and it is short. " * 30)
    code, out, err = run("prepare", tmp_path / "data", "--text", tmp_path / "text", "--vocab-size", 270,
                       "--held-out", 0.2, "--json")
    assert code == 0, err
    assert json.loads(out)["vocab_size"] == 270
    sizes = ["model.vocab_size=270", "model.d_model=32", "model.attention.n_heads=2", "model.attention.n_kv_heads=1",
             "model.attention.head_dim=16", "model.mlp.d_ff=48", "train.seq_len=32", "train.batch_size=2",
             "train.micro_batch_size=2", "train.steps=3", "optim.warmup_samples=2"]
    code, out, err = run("train", "tiny-transformer", *sizes, "--data", tmp_path / "data", "--out", tmp_path / "run",
                         "--profile", "2:3")
    assert code == 0, err
    assert (tmp_path / "run" / "profile" / "steps-2-3.json").exists()
    assert "finished at step 3" in out
    assert "loss" in err
    code, out, _ = run("eval", tmp_path / "run", "heldout", "mqar", "--samples", 4, "--pairs", "4", "--json")
    assert code == 0
    assert {row["what"] for row in json.loads(out)} >= {"held_out_loss", "bits_per_byte", "mqar.accuracy"}
    code, out, _ = run("bench", "generate", "--run", tmp_path / "run", "--contexts", "8,16", "--tokens", 2, "--json")
    assert code == 0
    assert [row["shape"].split()[0] for row in json.loads(out) if row["what"] == "state_bytes"] == [
        "context=8", "context=16"]
    code, out, _ = run("generate", tmp_path / "run", "this is", "--max-tokens", 5)
    assert code == 0
    assert out.endswith("\n")


def test_a_run_goes_out_and_comes_back(run, trained_run: Run, tmp_path: Path) -> None:
    code, out, err = run("convert", trained_run.path, tmp_path / "out", "--to", "megatron", "--dry-run")
    assert code == 0, err
    assert "nothing was written" in out
    assert not (tmp_path / "out").exists()
    code, out, err = run("convert", trained_run.path, tmp_path / "out", "--to", "megatron", "--layout", "released")
    assert code == 0, err
    assert "written in" in out
    code, out, err = run("convert", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert "mixer.in_proj.weight" in out
    assert "layers.0.layer.in_proj.z.weight" in out
    assert "every name, shape and type is right" in out
    code, out, err = run("convert", tmp_path / "out", tmp_path / "back", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == json.loads((tmp_path / "back" / "checkpoints" / "step-00000000" /
                                                        "meta.json").read_text())["source"]["parameters"]
    first = run("generate", trained_run.path, "the self", "--max-tokens", 5)
    assert run("generate", tmp_path / "back", "the self", "--max-tokens", 5) == first


@pytest.mark.parametrize(("arguments", "message"), [
    (("show", "8b-hybird"), "Did you mean 8b-hybrid?"),
    (("show", "long/8b-hybird-16k"), "Did you mean long/8b-hybrid-16k?"),
    (("show", "8b-hybrid-128k"), "Did you mean long/8b-hybrid-128k?"),
    (("show", "abacus"), "8b-transformer-1100b, long/8b-hybrid-128k, long/8b-hybrid-16k"),
    (("show", "tiny-hybrid", "--mfu", "0"), "mfu is 0.0; it is a share of the hardware's peak rate"),
    (("show", "tiny-hybrid", "--mfu", "45"), "above 0 and at most 1"),
    (("show", "tiny-hybrid", "model.d_modle=4"), "Did you mean model.d_model?"),
    (("show", "tiny-hybrid", "model.attention.n_kv_heads=5"), "must divide"),
    (("train", "tiny-hybrid"), "--data"),
    (("eval", "no-such-run", "heldout"), "not a run directory"),
    (("generate", "no-such-run", "x"), "not a run directory"),
    (("report", "no-such-study"), "no-such-study"),
    (("study", "no-such-study"), "no-such-study"),
    (("bench", "kernel"), "known: eval, generate, kernels, quality, train"),
    (("bench", "kernels", "--only", "no-such-case"), "fits no case"),
    (("prepare", "x", "--text", "no-such-text"), "no-such-text"),
    (("convert", "no-such-folder", "x"), "no folder, and no Hub id"),
    (("convert", "recipes", "x"), "no checkpoint that hinny knows; it holds 130m-"),
    (("convert", "recipes", "x", "--from", "gguf"), "unknown format 'gguf'"),
    (("convert", "no-such-run", "x", "--to", "llama"), "not a run directory"),
    (("convert", "no-such-run"), "a target is needed"),
    (("convert", "recipes", "--verify", "mamba2-8b-3t-4k"), "has no checkpoint"),
    (("convert", "recipes", "--verify", "mamba3-8b"), "known releases: mamba2-8b-3t-4k"),
])
def test_a_mistake_gets_one_message(run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 1
    assert message in err
    assert err.startswith("hinny: ")
    assert "Traceback" not in err + out


@pytest.mark.parametrize("arguments", [
    ("show",), ("show", "tiny-hybrid", "--layers", "4"), ("show", "--pattern"), ("eval", "x"),
    ("show", "--pattern", "--layers", "4", "--hardware", "H100"),
    ("show", "--pattern", "--layers", "4", "--mfu", "0.4"), ("show", "tiny-hybrid", "--mfu", "half"),
    ("bench", "train"), ("bench", "train", "--recipe", "tiny-hybrid", "--contexts", "4"), ("bench", "generate"),
    ("bench", "kernels", "--threads", "2"), ("bench", "generate", "--run", "x", "--only", "ssd.*"),
    ("convert",), ("convert", "x", "y", "--piqa", "z"), ("convert", "x", "--verify", "y", "--to", "llama"),
    ("convert", "x", "--verify", "y", "--tp", "2"),
    ("convert", "x", "y", "--tp", "0"),
    ("eval", "x", "heldout", "--lengths", "a,b"), ("no-such-verb",), ("show", "tiny-hybrid", "--no-such-option")])
def test_an_option_acts_or_is_refused(run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err + out


def test_the_module_is_the_command(trained_run: Run) -> None:
    done = subprocess.run([sys.executable, "-m", "hinny", "show", "tiny-mamba2", "--json"], capture_output=True,
                          text=True, check=True)
    assert json.loads(done.stdout)["pattern"].startswith("M")


@pytest.mark.parametrize(("ranks", "said"), [
    ({"WORLD_SIZE": "2"}, "hinny: no file"), ({"WORLD_SIZE": "2", "RANK": "1"}, "hinny: rank 1: no file")])
def test_a_mistake_is_told_with_the_rank_where_there_are_several(ranks, said, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["hinny", "show", "no-such-recipe"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith(said)
