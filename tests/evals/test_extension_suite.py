"""The suite `extension`: depths are where they are said to be, norms are those of the states, both models are asked."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hinny.config import load_recipe
from hinny.data import synthetic
from hinny.data.folder import DataFolder
from hinny.data.prepare import prepare
from hinny.errors import ConfigError
from hinny.evals import EvalOptions, evaluate
from hinny.evals.norms import state_norms
from hinny.evals.recall import DEPTHS, phonebook_depths
from hinny.infer.engine import Engine
from hinny.run import Run
from hinny.study.extension import report
from hinny.train.loop import train

TINY = ["model.d_model=32", "train.batch_size=2", "train.micro_batch_size=2", "train.steps=2", "train.save_every=2",
        "optim.warmup_samples=1", "train.precision=fp32", "model.vocab_size=512", "data.synthetic.share=0.5"]
SMALL = {"hybrid": [*TINY, "model.mamba2.d_state=8", "model.attention.n_heads=2", "model.attention.head_dim=16",
                    "model.mlp.d_ff=32", "model.n_layers=null", "model.attention_ratio=null", "model.mlp_ratio=null",
                    "model.pattern=M*-"],
         "transformer": [*TINY, "model.attention.n_heads=2", "model.attention.n_kv_heads=2",
                         "model.attention.head_dim=16", "model.mlp.d_ff=32", "model.pattern=*-"]}


def text(folder: Path, word: str) -> Path:
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(f"{word} number {number} of {k} is told." for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extended")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Run]:
    """Base and extension of a hybrid, on other text; a Transformer without a base."""
    prepare(home / "data", text=[text(home / "one", "apple")], vocab_size=512, held_out=0.3, recall_words=True)
    prepare(home / "longer", text=[text(home / "two", "pear")], tokenizer=home / "data" / "tokenizer.json",
            held_out=0.3)
    hybrid, plain = SMALL["hybrid"], SMALL["transformer"]
    base = train(load_recipe("tiny-hybrid", [*hybrid, "train.seq_len=128"]), home / "base", data=str(home / "data"))
    long = train(load_recipe("tiny-hybrid", [*hybrid, "train.seq_len=256", f"init.from={base.path}"]), home / "long",
                 data=str(home / "longer"))
    other = train(load_recipe("tiny-transformer", [*plain, "train.seq_len=128"]), home / "other",
                  data=str(home / "data"))
    return {"base": base, "long": long, "other": other}


@pytest.fixture(scope="module")
def engine(runs: dict[str, Run]) -> Engine:
    return Engine(runs["long"].path)


def test_the_entry_that_is_asked_for_stands_at_its_depth(engine: Engine) -> None:
    for depth, share in ((0, 0.0), (50, 0.5), (100, 1.0)):
        example = synthetic.phonebook(np.random.default_rng(3), engine.tokenizer, length=900, digits=10,
                                      form="standard", depth=depth / 100)
        lines = engine.tokenizer.decode(example.tokens).split("\n")
        number = lines[-1].split()[-1]
        book = [line for line in lines if line.count(":") == 1 and line[-1].isdigit() and "Answer" not in line]
        places = [i for i, line in enumerate(book) if line.endswith(number)]
        assert len(book) > 12
        assert abs(places[0] / (len(book) - 1) - share) <= 0.5 / (len(book) - 1), (depth, places)


def test_a_reader_of_the_last_tokens_alone_fails_where_the_entry_is_too_far_away(
        engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reach, eod = 300, engine.tokenizer.eod

    def oracle(tokens: torch.Tensor) -> torch.Tensor:
        """Knows the number, the end of each row, if it stands among the last `reach` tokens before it."""
        logits = torch.zeros(*tokens.shape, 512)
        for i, ids in enumerate(tokens.tolist()):
            while ids[-1] == eod:
                ids.pop()
            size = len(engine.tokenizer.encode(engine.tokenizer.decode(ids).split(" ")[-1]))
            number, seen = ids[-size:], ids[max(0, len(ids) - reach):-size]
            if any(seen[k:k + size] == number for k in range(len(seen))):
                for place in range(len(ids) - 1):
                    logits[i, place, ids[place + 1]] = 1.0
        return logits

    monkeypatch.setattr(engine, "logits", oracle)
    rows = phonebook_depths(engine, EvalOptions(samples=3, lengths=(300, 900)))
    cells = {row["shape"]: row["value"] for row in rows}
    assert list(cells) == [f"length={length} depth={depth} digits=4" for length in (300, 900) for depth in DEPTHS]
    assert all(value == 1.0 for shape, value in cells.items() if "length=300" in shape)
    assert [cells[f"length=900 depth={depth} digits=4"] for depth in DEPTHS] == [0, 0, 0, 0, 0, 1, 1]
    with pytest.raises(ConfigError, match=r"the smallest phone book of 4-digit numbers takes \d+ tokens"):
        phonebook_depths(engine, EvalOptions(lengths=(16,)))


def test_norms_are_those_of_the_states_token_by_token(engine: Engine, runs: dict[str, Run]) -> None:
    rows = state_norms(engine, EvalOptions(samples=2, lengths=(200,)))
    data = engine.run.recipe.data.path
    tokens = torch.from_numpy(DataFolder(data, None).shard("heldout").tokens(0, 400).astype(np.int64)).view(2, 200)
    state = engine.model.init_state(2)
    expected: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for t in range(200):
            engine.model.hidden(tokens[:, t:t + 1], state)
            if t + 1 in (64, 128, 200):
                ssm = state.layers[0].ssm.double()
                expected[f"layer=0 position={t + 1} sequences=2"] = (float(ssm.square().mean().sqrt()),
                                                                     float(ssm.abs().max()))
    for place, what in enumerate(("state_norm.rms", "state_norm.largest")):
        found = {row["shape"]: row["value"] for row in rows if row["what"] == what}
        assert found == {shape: pytest.approx(values[place], rel=1e-4) for shape, values in expected.items()}
    with pytest.raises(ConfigError, match="has no Mamba layer"):
        state_norms(Engine(runs["other"].path), EvalOptions())


def found(run: Run) -> dict[str, Any]:
    return json.loads((run.path / "extension.json").read_text())


def values(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    return {row["shape"]: row["value"] for row in rows if row["what"] == what}


def test_both_models_are_asked_the_same_on_the_text_of_the_extension(runs: dict[str, Run]) -> None:
    rows = evaluate(runs["long"].path, suite="extension", options=EvalOptions(samples=2))
    content = found(runs["long"])
    assert content["after"] == rows
    assert (content["trained_length"], content["base_length"], content["no_base"]) == (256, 128, "")
    for what in ("window_loss", "joined_loss_by_position", "phonebook_depth.exact", "copy.accuracy", "mqar.accuracy",
                 "state_norm.rms"):
        before, after = (values(content[side], what) for side in ("before", "after"))
        assert before.keys() == after.keys(), what
        assert after
    windows = values(content["before"], "window_loss")
    assert list(windows) == [f"length={n} sequences=2" for n in (128, 256, 512, 1024)]
    # the base on the pears of the extension, a plain pass a window
    pears = DataFolder(str(runs["long"].recipe.data.path), None).shard("heldout").tokens(0, 2 * 1024 + 1)
    ids = torch.from_numpy(pears.astype(np.int64))
    model = Engine(runs["base"].path).model
    with torch.no_grad():
        logits = model(ids[:-1].view(-1, 128)).double().log_softmax(-1)
    by_hand = -logits.gather(-1, ids[1:].view(-1, 128, 1)).mean()
    assert windows["length=128 sequences=2"] == pytest.approx(float(by_hand), abs=1e-5)
    page = report(runs["long"].path)
    shown = (page.with_suffix(".md")).read_text()
    assert "| Loss at the base's length | " in shown
    assert "extended to 256 tokens" in page.read_text()


def test_what_is_finished_is_not_run_again(runs: dict[str, Run], caplog: pytest.LogCaptureFixture) -> None:
    evaluate(runs["long"].path, suite="extension", options=EvalOptions(samples=2))
    with caplog.at_level(logging.INFO, logger="hinny.evals"):
        caplog.clear()
        evaluate(runs["long"].path, suite="extension", options=EvalOptions(samples=2))
    assert sum("finished before" in record.message for record in caplog.records) >= 12


def test_a_run_without_a_base_and_one_whose_base_is_gone_are_asked_alone(
        runs: dict[str, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(runs["other"].path, suite="extension", options=EvalOptions(samples=1))
    content = found(runs["other"])
    assert content["before"] == []
    assert "began with its own first weights" in content["no_base"]
    # rotary positions end at the trained length, and there are no states
    assert "skipped: state-norms" in caplog.text
    shutil.copytree(runs["long"].path, tmp_path / "long")
    for file in (tmp_path / "long" / "checkpoints").glob("*/meta.json"):
        file.write_text(file.read_text().replace(str(runs["base"].path), str(tmp_path / "gone")))
    evaluate(tmp_path / "long", suite="extension", options=EvalOptions(samples=1))
    assert "gone" in found(Run(tmp_path / "long"))["no_base"]
    assert "Nothing to compare with" in report(tmp_path / "long").with_suffix(".md").read_text()
