"""Launch tables: the first rule that fits is used, what was measured here comes first, and a stale file is refused."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hinny.errors import BackendError
from hinny.ops.kernels import launches

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL, LARGE, CAREFUL = ({"Q": q, "num_warps": 4, "num_stages": s} for q, s in ((16, 1), (64, 3), (32, 2)))
SHIPPED = {
    "sm90": {"scan": [{"when": {"n": 16}, "use": SMALL}, {"when": {"n": [17, 128], "t": [1, 64]}, "use": CAREFUL},
                      {"when": {}, "use": LARGE}]},
    "default": {"scan": [{"when": {"n": [1, 64]}, "use": SMALL}, {"when": {}, "use": CAREFUL}],
                "sum": [{"when": {}, "use": {"ROWS": 8, "num_warps": 4, "num_stages": 1}}]},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Made-up shipped tables, a machine with a GPU that is asked for by name, and an empty cache folder of the user."""
    launches.forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(launches, "rules", functools.cache(SHIPPED.__getitem__))
        patched.setattr(launches, "tables", functools.cache(lambda: tuple(sorted(SHIPPED))))
        patched.setattr(launches, "architecture", lambda device: "sm90")
        yield tmp_path / "hinny" / "launch"
    launches.forget()


def _measured(home: Path, name: str, **tables: object) -> Path:
    (home / name).mkdir(parents=True)
    file = home / name / "measured.json"
    file.write_text(json.dumps(tables))
    launches.forget()
    return file


def test_the_first_rule_that_fits_is_used() -> None:
    assert launches.launch("scan", GPU, n=16, t=9) == SMALL
    assert launches.launch("scan", GPU, n=17, t=64) == CAREFUL
    assert launches.launch("scan", GPU, n=128, t=65) == LARGE
    assert launches.find("default", "scan", n=64, t=65) == SMALL


def test_what_a_caller_does_with_a_launch_stays_with_it() -> None:
    launches.launch("scan", GPU, n=16, t=9).clear()
    assert launches.launch("scan", GPU, n=16, t=9) == SMALL


def test_the_default_serves_kernels_and_gpus_that_were_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    assert launches.launch("sum", GPU) == SHIPPED["default"]["sum"][0]["use"]
    monkeypatch.setattr(launches, "architecture", lambda device: "sm86")
    launches.forget()
    with caplog.at_level(logging.INFO):
        assert launches.launch("scan", GPU, n=65, t=1) == launches.launch("scan", CPU, n=65, t=1) == CAREFUL
    assert [r.message for r in caplog.records] == [
        "no launch table was measured for sm86: kernels use careful defaults; `hinny tune` measures one"]


@pytest.mark.parametrize("name", ["sm90", "sm86"])
def test_what_was_measured_here_comes_first_and_is_said_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str,
) -> None:
    monkeypatch.setattr(launches, "architecture", lambda device: name)
    _measured(home, name, scan=[{"when": {}, "use": LARGE}])
    with caplog.at_level(logging.INFO):
        assert launches.launch("scan", GPU, n=16, t=9) == launches.launch("scan", GPU, n=1, t=1) == LARGE
        assert launches.launch("sum", GPU) == SHIPPED["default"]["sum"][0]["use"]
    assert [r.message for r in caplog.records] == [f"launch tables: scan measured on this machine, from {home / name}"]
    assert launches.launch("scan", CPU, n=16, t=9) == SMALL, "the CPU's interpreter was not measured"


@pytest.mark.parametrize("table", [
    [{"when": {}, "use": {"Q": 16}}], [{"when": {"heads": 4}, "use": LARGE}], [{"use": LARGE}], "fast", [7]])
def test_a_measured_file_of_another_version_is_refused_by_name(home: Path, table: object) -> None:
    file = _measured(home, "sm90", scan=table)
    with pytest.raises(BackendError, match=f"{file}.* version.*Delete it"):
        launches.launch("scan", GPU, n=16, t=9)


def test_a_measured_file_of_unknown_kernels_or_no_json_is_refused(home: Path) -> None:
    file = _measured(home, "sm90", stroll=[{"when": {}, "use": LARGE}])
    with pytest.raises(BackendError, match="KeyError 'stroll'"):
        launches.launch("sum", GPU)
    file.write_text("{")
    launches.forget()
    with pytest.raises(BackendError, match=f"{file} is no launch table"):
        launches.launch("sum", GPU)


def test_a_trial_replaces_launches_and_tells_which_rules_they_took() -> None:
    with launches.trial({"scan": LARGE}) as seen:
        assert launches.launch("scan", GPU, n=16, t=9) == LARGE
        assert launches.launch("scan", GPU, n=20, t=9) == LARGE
        assert launches.launch("sum", GPU) == SHIPPED["default"]["sum"][0]["use"]
    assert seen == {("scan", 0), ("scan", 1), ("sum", 0)}
    assert launches.launch("scan", GPU, n=16, t=9) == SMALL


def test_a_table_without_a_last_resort_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="empty 'when'"):
        launches.matching([{"when": {"n": 1}, "use": {}}], "scan", {"n": 2})
