"""`hinny tune` without a GPU: made-up kernels whose speed is known, so what it must choose is known."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

import hinny
from hinny.bench.kernel_cases import Case
from hinny.cli import main
from hinny.errors import BackendError, ConfigError
from hinny.ops.kernels import compile as compiling
from hinny.ops.kernels import launches
from hinny.tune import Meter, measure, table_text, tune

CPU = torch.device("cpu")


def _use(q: int) -> dict[str, int]:
    return {"Q": q, "num_warps": 4, "num_stages": 1}


TABLE = {"scan": [{"when": {"n": [1, 16]}, "use": _use(16)}, {"when": {}, "use": _use(32)}],
         "sum": [{"when": {}, "use": _use(8)}]}
CANDIDATES = {"scan": [_use(q) for q in (16, 32, 64, 128)], "sum": [_use(q) for q in (8, 9)]}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shipped tables are TABLE."""
    launches.forget()
    with monkeypatch.context() as patched:
        patched.setattr(launches, "subjects", functools.cache(lambda name: {"scan": TABLE}))
        yield
    launches.forget()


def _case(name: str, *kernels: str, n: int) -> Case:
    """A case that launches these kernels and returns what they were launched with."""
    def ours(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([launches.launch(kernel, CPU, n=n)["Q"] for kernel in kernels])

    return Case(name, f"n={n}", lambda draw: {"x": torch.zeros(1)}, ours, moved=1.0)


class Machine:
    """Kernels take milliseconds by their Q, times a factor of the case; some Q are wrong, some cannot be launched."""

    def __init__(self, cost: dict[int, float], wrong: tuple[int, ...] = (), fails: tuple[int, ...] = ()) -> None:
        self.cost, self.wrong, self.fails, self.factor = cost, wrong, fails, {}

    def launched(self, case: Case) -> list[int]:
        return case.ours(x=torch.zeros(1)).tolist()

    def meter(self) -> Meter:
        def works(case: Case) -> list[Callable[[], object]]:
            def call() -> list[int]:
                found = self.launched(case)
                if set(found) & set(self.fails):
                    raise RuntimeError("out of resource: shared memory\nand more")
                return found

            return [call]

        return Meter(works, lambda calls: sum(self.cost[q] for q in calls[0]()) / 1e3,
                     lambda case: not set(self.launched(case)) & set(self.wrong))


def test_each_rule_gets_the_fastest_launch_over_the_cases_that_meet_it() -> None:
    machine = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 5.0, 8: 1.0, 9: 7.0})
    cases = [_case("short", "scan", n=8), _case("long", "scan", "sum", n=64), _case("longer", "scan", n=128)]
    tuned, rows = measure(cases, CANDIDATES, TABLE, machine.meter(), "a GPU")
    assert tuned == {"scan": [{"when": {"n": [1, 16]}, "use": _use(64)}, {"when": {}, "use": _use(64)}],
                     "sum": TABLE["sum"]}
    assert [(r["variant"], r["shape"].split(" use=")[0]) for r in rows] == [
        ("scan", "rule=0 cases=1"), ("scan", "rule=1 cases=2"), ("sum", "rule=0 cases=1")]
    short, longer, _ = rows
    assert (short["value"], short["peer_value"], short["ratio"]) == pytest.approx((2.0, 4.0, 2.0))
    # geometric means: (2 + 1, 2) against (3 + 1, 3)
    assert (longer["value"], longer["peer_value"]) == pytest.approx((math.sqrt(6), math.sqrt(12)))


def test_a_launch_that_is_wrong_or_cannot_be_made_is_passed_over() -> None:
    machine = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 1.0}, wrong=(64,), fails=(128,))
    tuned, _ = measure([_case("long", "scan", n=8)], CANDIDATES, TABLE, machine.meter(), "a GPU")
    assert tuned["scan"][0]["use"] == _use(32)
    assert tuned["scan"][1] == TABLE["scan"][1], "no case met this rule"


def test_a_gain_within_the_noise_changes_nothing() -> None:
    machine = Machine({16: 4.0, 32: 3.95, 64: 4.1, 128: 9.0})
    tuned, (found,) = measure([_case("long", "scan", n=8)], CANDIDATES, TABLE, machine.meter(), "a GPU")
    assert tuned == TABLE
    assert found["ratio"] == 1.0


def test_a_case_whose_present_launch_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine({32: 3.0, 64: 2.0, 128: 5.0}, fails=(16,))
    cases = [_case("short", "scan", n=8), _case("long", "scan", n=64)]
    tuned, (found,) = measure(cases, CANDIDATES, TABLE, machine.meter(), "a GPU")
    assert tuned["scan"] == [TABLE["scan"][0], {"when": {}, "use": _use(64)}]
    assert found["shape"].startswith("rule=1 cases=1 ")
    assert "short n=8: left out from here on: RuntimeError out of resource: shared memory\n" in caplog.text


@pytest.mark.parametrize("kind", ["memory", "triton"])
def test_a_case_that_cannot_be_set_up_is_left_out(kind: str) -> None:
    meter = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 5.0}).meter()

    def works(case: Case) -> list[Callable[[], object]]:
        if case.what == "large":
            raise torch.OutOfMemoryError("no") if kind == "memory" else OutOfResources(1, 0, "shared memory")
        return meter.works(case)

    cases = [_case("large", "scan", n=8), _case("short", "scan", n=8)]
    tuned, rows = measure(cases, CANDIDATES, TABLE, dataclasses.replace(meter, works=works), "a GPU")
    assert tuned["scan"][0]["use"] == _use(64)
    assert [r["shape"].split(" use=")[0] for r in rows] == ["rule=0 cases=1"]


def test_a_launch_that_cannot_be_checked_is_passed_over() -> None:
    machine = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 5.0})

    def right(case: Case) -> bool:
        if 64 in machine.launched(case):
            raise RuntimeError("out of memory")
        return True

    meter = dataclasses.replace(machine.meter(), right=right)
    tuned, _ = measure([_case("long", "scan", n=8)], CANDIDATES, TABLE, meter, "a GPU")
    assert tuned["scan"][0]["use"] == _use(32)


def test_only_the_kernels_asked_for_are_measured() -> None:
    machine = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 5.0, 8: 3.0, 9: 1.0})
    cases = [_case("long", "scan", "sum", n=8)]
    tuned, rows = measure(cases, {"sum": CANDIDATES["sum"]}, TABLE, machine.meter(), "a GPU")
    assert [r["variant"] for r in rows] == ["sum"]
    assert tuned["sum"][0]["use"] == _use(9)
    assert tuned["scan"] == TABLE["scan"]


def test_a_table_is_written_as_launches_read_it() -> None:
    text = table_text(TABLE)
    assert json.loads(text) == TABLE
    assert sum('"when"' in line for line in text.splitlines()) == 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that says it has a GPU of a generation that no table is shipped for, and its user's cache folder."""
    module = SimpleNamespace(candidates=lambda: CANDIDATES)
    monkeypatch.setattr(compiling, "kernel_modules", lambda: [module])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"current_device": 0, "get_device_name": "a GPU", "Stream": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(launches, "architecture", lambda device: "sm86")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = Machine({16: 4.0, 32: 3.0, 64: 2.0, 128: 5.0, 8: 1.0, 9: 7.0})
    monkeypatch.setattr(hinny.tune, "use_backend", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(hinny.tune, "_gpu_meter", lambda device: machine.meter())
    monkeypatch.setattr(hinny.tune, "all_cases", lambda: [_case("short", "scan", n=8)])
    return tmp_path / "hinny" / "launch"


def test_what_was_measured_is_launched_from_then_on(gpu: Path) -> None:
    device = torch.device("cuda", 0)
    assert launches.launch("scan", device, n=8) == _use(16)
    (found,) = tune(["scan"])
    assert found["machine"].count("a GPU") == 1
    assert json.loads((gpu / "sm86" / "scan.json").read_text())["sum"] == TABLE["sum"]
    assert launches.launch("scan", device, n=8) == _use(64)
    assert launches.launch("scan", device, n=99) == _use(32)


def test_a_table_is_written_where_it_is_wanted(gpu: Path, tmp_path: Path) -> None:
    tune(out=tmp_path / "tables")
    assert json.loads((tmp_path / "tables" / "sm86" / "scan.json").read_text())["scan"][0]["use"] == _use(64)
    assert not gpu.exists()


def test_an_unknown_kernel_is_refused(gpu: Path) -> None:
    with pytest.raises(ConfigError, match=r"'scam' is not known.*known: scan, sum"):
        tune(["scam"])


def test_without_a_gpu_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="tune measures on a GPU"):
        hinny.tune()


def test_the_command_line_passes_kernels_and_folder_on(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["hinny", "tune", "scan", "--out", str(tmp_path / "tables"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    (found,) = json.loads(capsys.readouterr().out)
    assert found["variant"] == "scan"
    assert (tmp_path / "tables" / "sm86" / "scan.json").exists()
