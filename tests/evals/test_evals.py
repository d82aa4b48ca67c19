"""Evaluations: an oracle scores 1, a constant 0, and the figures are those of an independent computation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hinny.data.mix import heldout_batches
from hinny.data.prepare import prepare
from hinny.errors import ConfigError, DataError
from hinny.evals import EvalOptions, evaluate, perplexity
from hinny.evals.perplexity import held_out
from hinny.evals.recall import copying, mqar, phonebook, wilson
from hinny.infer.engine import Engine
from hinny.run import Run

OPTIONS = EvalOptions(samples=6, lengths=(300, 400), pairs=(3, 5), windows=3)
# byte tokens are long: the reversed phone book's frame alone has 400 of them
PHONEBOOK = EvalOptions(samples=4, lengths=(620,))


@pytest.fixture
def engine(trained_run: Run) -> Engine:
    return Engine(trained_run.path)


def _answering(engine: Engine, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Tensor], Tensor]) -> None:
    """Let `answer`, from tokens (b t) to the next tokens (b t), speak instead of the model."""
    def logits(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(answer(tokens), engine.tokenizer.vocab_size).float()

    monkeypatch.setattr(engine, "logits", logits)


def _shares(rows: list[dict], what: str) -> list[float]:
    return [row["value"] for row in rows if row["what"] == what]


def test_an_oracle_recalls_everything(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(engine, monkeypatch, lambda tokens: tokens.roll(-1, dims=1))
    assert _shares(phonebook(engine, PHONEBOOK), "phonebook.exact") == [1.0, 1.0]
    assert _shares(phonebook(engine, PHONEBOOK), "phonebook.digits") == [1.0, 1.0]
    assert _shares(mqar(engine, OPTIONS), "mqar.accuracy") == [1.0, 1.0]
    assert _shares(copying(engine, OPTIONS), "copy.accuracy") == [1.0, 1.0]


def test_a_constant_recalls_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(engine, monkeypatch, lambda tokens: torch.full_like(tokens, engine.tokenizer.eod))
    rows = phonebook(engine, PHONEBOOK) + mqar(engine, OPTIONS) + copying(engine, OPTIONS)
    assert {row["value"] for row in rows} == {0.0}


def test_one_wrong_digit_fails_the_number_and_costs_one_digit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_last(tokens: Tensor) -> Tensor:
        truth = tokens.roll(-1, dims=1)
        ends = [int(np.flatnonzero(row.numpy() != engine.tokenizer.eod)[-1]) for row in tokens]
        truth[torch.arange(len(truth)), torch.tensor(ends) - 1] = engine.tokenizer.eod
        return truth

    _answering(engine, monkeypatch, all_but_last)
    rows = phonebook(engine, PHONEBOOK)
    assert _shares(rows, "phonebook.exact") == [0.0, 0.0]
    assert _shares(rows, "phonebook.digits") == [0.75, 0.75]


def test_a_model_that_reads_the_book_solves_the_standard_form(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt alone, as text, is enough: what is asked for stands in it."""
    def read(tokens: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for i, row in enumerate(tokens):
            text = engine.tokenizer.decode(row.tolist())
            prompt, _, _ = text.rpartition("Answer: ")
            name = prompt.rpartition("What is the phone number for ")[2].partition("?")[0]
            number = text.partition(f"{name}: ")[2][:4]
            start = len(engine.tokenizer.encode(prompt + "Answer: "))
            out[i, start - 1:start + 3] = torch.tensor(engine.tokenizer.encode(number))
        return out

    _answering(engine, monkeypatch, read)
    assert _shares(phonebook(engine, PHONEBOOK), "phonebook.exact") == [1.0, 1.0]


def test_lengths_too_short_for_a_form_have_no_row(engine: Engine) -> None:
    rows = phonebook(engine, EvalOptions(samples=1, lengths=(330, 620)))
    assert {row["shape"] for row in rows} == {
        f"form={form} length={length} digits=4" for form, length in (("standard", 330), ("standard", 620),
                                                                     ("reversed", 620))}
    with pytest.raises(ConfigError, match="the smallest standard phone book"):
        phonebook(engine, EvalOptions(samples=1, lengths=(20,)))


def test_examples_do_not_depend_on_the_model(trained_run: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    _answering(engine, monkeypatch, lambda tokens: seen.append(tokens) or tokens)
    for _ in range(2):
        mqar(engine, OPTIONS)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_scores_do_not_depend_on_what_else_is_in_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    together = [row["value"] for row in mqar(engine, OPTIONS) + copying(engine, OPTIONS)]
    monkeypatch.setattr("hinny.evals.recall.TOKENS_AT_ONCE", 1)
    assert [row["value"] for row in mqar(engine, OPTIONS) + copying(engine, OPTIONS)] == together


def test_long_windows_are_read_few_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    together, sizes, forward = held_out(engine, OPTIONS), [], engine.model.forward

    def counted(tokens: Tensor, **more: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return forward(tokens, **more)

    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 2 * engine.run.recipe.train.seq_len)
    monkeypatch.setattr(engine.model, "forward", counted)
    apart = held_out(engine, OPTIONS)
    assert sizes == [2, 1]
    assert [row["value"] for row in apart] == pytest.approx([row["value"] for row in together], rel=1e-6)


def test_held_out_loss_is_the_mean_over_documents_taken_alone(engine: Engine) -> None:
    rows = held_out(engine, OPTIONS)
    recipe = engine.run.recipe
    losses, by_place, n_bytes = [], {}, 0
    for batch in heldout_batches(recipe.data, seq_len=recipe.train.seq_len, batch_size=1, windows=3):
        for document in np.unique(batch.segments):
            inside = batch.segments[0] == document
            tokens, targets, mask = (a[0][inside] for a in (batch.tokens, batch.targets, batch.mask))
            with torch.no_grad():
                p = engine.model(torch.from_numpy(tokens)[None])[0].double().log_softmax(-1)
            for place, (target, counts) in enumerate(zip(targets.tolist(), mask.tolist(), strict=True)):
                if counts:
                    losses.append(-float(p[place, target]))
                    by_place.setdefault(place, []).append(losses[-1])
                    n_bytes += target != engine.tokenizer.eod
    found = {row["what"]: row for row in rows}
    assert found["held_out_loss"]["value"] == pytest.approx(np.mean(losses), abs=1e-5)
    # this run's tokens are bytes
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(losses) / math.log(2) / n_bytes, abs=1e-5)
    first = next(row for row in rows if row["shape"] == "position=0-3")
    assert first["value"] == pytest.approx(np.mean([x for p in range(4) for x in by_place.get(p, [])]), abs=1e-5)


def test_data_prepared_anew_are_refused_with_both_fingerprints(trained_run: Run, tmp_path: Path) -> None:
    shutil.copytree(trained_run.path, tmp_path / "run")
    run, recipe = Run(tmp_path / "run"), trained_run.recipe
    assert recipe.data.path is not None
    path = Path(recipe.data.path)
    prepare(tmp_path / "anew", text=[path.parent], tokenizer="bytes", held_out=0.2, seed=1)
    run.write_recipe(recipe.model_copy(update={"data": recipe.data.model_copy(
        update={"path": str(tmp_path / "anew")})}))
    now, then = (json.loads((folder / "data.json").read_text())["fingerprint"] for folder in (tmp_path / "anew", path))
    with pytest.raises(DataError, match=rf"anew holds other data than .*{now[:12]}.*data\.json says {then[:12]}"):
        held_out(Engine(run.path), OPTIONS)


def test_results_are_saved_with_the_run(trained_run: Run) -> None:
    options = EvalOptions(samples=6, lengths=(300, 400), pairs=(3, 5))
    rows = evaluate(trained_run.path, ["mqar", "copy", "mqar"], options)
    assert trained_run.rows("mqar") + trained_run.rows("copy") == rows
    assert {"command", "commit", "machine"} <= {key for row in rows for key, value in row.items() if value}


@pytest.mark.parametrize("options", [dict(samples=0), dict(lengths=()), dict(pairs=(0,)), dict(windows=0)])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError):
        EvalOptions(**options)


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634),
                                                        (10, 10, 0.7225, 1.0)])
def test_intervals_are_wilsons(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=2e-4)
