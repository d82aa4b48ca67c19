"""The verification of a released model, on a small stand-in: every item can pass, and every item can fail."""

import hashlib
import json
import sys

import fake_format
import pytest
import torch

import hinny
from hinny.checkpoint import formats, load_model, releases
from hinny.cli import main
from hinny.config import load_recipe
from hinny.counts import parameters
from hinny.errors import CheckpointError, ConfigError, DataError
from hinny.evals import released
from hinny.tokenizer import BYTES_FILE

PROMPTS = ("The capital", "Two plus", "é")


pytestmark = pytest.mark.usefixtures("only_the_fake_format")


def greedy(model, prompt):
    """Sixteen tokens, each from a whole pass over all before it, one byte a token."""
    ids = list(prompt.encode())
    for _ in range(16):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :257].argmax()))
        if ids[-1] == 256:
            break
    return bytes(i for i in ids if i < 256).decode(errors="replace")[len(prompt):]


def likelihood(model, prompt, answer):
    ids, start = list((prompt + answer).encode()), len(prompt.encode())
    chances = model(torch.tensor([ids]))[0].softmax(-1)
    return sum(float(chances[i - 1, ids[i]].log()) for i in range(start, len(ids)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, questions, a run converted without the verifying code, and what is known of them by other code."""
    folder = tmp_path_factory.mktemp("stand-in")
    own = {name: value.float() * 3 for name, value in fake_format.ours().items()}
    source = fake_format.write(folder / "source", fake_format.theirs(own))
    (source / "tokenizer.json").write_bytes(BYTES_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hinny.checkpoint.formats.fake", fake_format)
        patch.setattr(formats, "FORMATS", {"fake": "fake"})
        hinny.convert(source, folder / "plain")
    model = load_model(folder / "plain").requires_grad_(False)
    questions, right = [], 0
    for i in range(7):
        solutions, label = ("use a spoon" * (1 + i % 3), "sing " * (i % 4 + 1) + "it"), i % 2
        scores = [likelihood(model, f"Question: make {i} things\nAnswer:", " " + text) for text in solutions]
        right += scores[label] > scores[1 - label]
        questions.append({"goal": f"make {i} things", "sol1": solutions[0], "sol2": solutions[1], "label": label})
    (folder / "piqa.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    file = source / "model.safetensors"
    return folder, releases.Release(
        "none/small", sum(p.numel() for p in model.parameters()), len(fake_format.rows(fake_format.CONFIG)),
        hashlib.sha256(file.read_bytes()).hexdigest(), file=file.name,
        greedy=tuple((prompt, greedy(model, prompt)) for prompt in PROMPTS), piqa=right / 7)


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.setitem(releases.RELEASES, "small", made[1])
    monkeypatch.setattr(releases, "PIQA_EXAMPLES", 7)
    return made[0]


def test_a_stand_in_passes_every_item(folder, tmp_path):
    record = hinny.convert(folder / "source", tmp_path / "run", verify="small")
    assert [item["passed"] for item in record["checks"]] == [True] * 3
    items = released.verify(tmp_path / "run", "small", piqa=folder / "piqa.jsonl")
    assert len(items) == 3 + len(PROMPTS) + 2
    assert all(item["passed"] for item in items), items


def test_each_item_can_fail(folder, made, tmp_path, monkeypatch):
    true = made[1]
    wrong = releases.Release(true.hub, true.parameters + 1, true.tensors + 1, "0" * 64, true.file,
                             tuple((prompt, text + "x") for prompt, text in true.greedy), true.piqa + 0.3)
    monkeypatch.setitem(releases.RELEASES, "small", wrong)
    monkeypatch.setattr(releases, "PIQA_EXAMPLES", 8)
    hinny.convert(folder / "source", tmp_path / "run", verify="small")
    items = released.verify(tmp_path / "run", "small", piqa=folder / "piqa.jsonl")
    assert [item["what"] for item in items if item["passed"]] == []
    assert {item["what"].split()[0] for item in items} == {"sha256", "tensors", "parameters", "continuation", "PIQA"}


def test_a_run_that_was_not_compared_when_it_was_converted_does_not_pass(folder):
    items = released.verify(folder / "plain", "small")
    assert [item["passed"] for item in items] == [False, *[True] * len(PROMPTS)]
    assert "convert the source again with --verify small" in items[0]["found"]


def test_likelihoods_are_those_of_the_whole_sequence(folder):
    found = released.log_likelihood(hinny.Engine(folder / "plain"), "one two", " three")
    with torch.no_grad():
        assert found == pytest.approx(likelihood(load_model(folder / "plain"), "one two", " three"), rel=1e-5)


def test_what_is_not_the_release_or_no_question_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"verify is 'gpt'; known releases: mamba2-8b-3t-4k, .*small"):
        released.verify(folder / "plain", "gpt")
    with pytest.raises(CheckpointError, match=r"is not nvidia/mamba2-8b-3t-4k: it has no release/mp_rank_00"):
        hinny.convert(folder / "source", tmp_path / "run", verify="mamba2-8b-3t-4k")
    (tmp_path / "bad.jsonl").write_text('{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: not a question.*label is 2"):
        released.verify(folder / "plain", "small", piqa=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        released.verify(folder / "plain", "small", piqa=tmp_path / "none.jsonl")


def test_known_counts_are_those_of_the_recipes():
    for name, recipe in (("mamba2-8b-3t-4k", "8b-mamba2"), ("mamba2-hybrid-8b-3t-4k", "8b-hybrid"),
                         ("mamba2-hybrid-8b-3t-128k", "8b-hybrid"), ("gpt3-8b-multi-3.5t-base", "8b-transformer")):
        assert releases.find(name).parameters == parameters(load_recipe(recipe).model).total
        assert releases.find(name).hub == f"nvidia/{name}"


def test_the_command_prints_pass_or_fail_for_each_item(folder, made, tmp_path, capsys, monkeypatch):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["hinny", "convert", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr()
        return 0, capsys.readouterr()

    code, found = command(folder / "source", tmp_path / "run", "--verify", "small", "--piqa", folder / "piqa.jsonl")
    assert code == 0, found.err
    assert "8 of 8 items passed" in found.out
    assert f"pass  sha256 of model.safetensors: '{made[1].sha256}'" in found.out
    monkeypatch.setitem(releases.RELEASES, "small", releases.Release("x/y", 1, greedy=(("The capital", "no"),)))
    code, found = command(tmp_path / "run", "--verify", "small", "--json")
    assert code == 1
    assert [item["passed"] for item in json.loads(found.out)["checks"]] == [True, True, True, False]
    code, found = command(folder / "plain", "--verify", "small")
    assert code == 1
    assert "FAIL  continuation of 'The capital': " in found.out
