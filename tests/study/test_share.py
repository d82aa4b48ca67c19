"""Several processes on one study folder: what is taken, taken over, waited for and told, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hinny.run import Run
from hinny.study import share
from hinny.study.share import Claims, FailedElsewhere

WORKER = Path(__file__).with_name("shared_worker.py")
SAVES = """
(folder / "ready").touch()
try: time.sleep(60)
except KeyboardInterrupt: (folder / "saved").touch(); sys.exit(130)
"""
"""A job that runs until it is told to save."""
FIRST_TIME = "if not (folder / 'ready').exists():\n" + "".join(
    f"    {line}\n" for line in SAVES.strip().splitlines())
"""The same at its first start; done at once at the second."""
Stages = list[dict[str, object]]


def start(folder: Path, stages: Stages, *options: str) -> subprocess.Popen[str]:
    """A process of the study, which has looked at the folder."""
    process = subprocess.Popen([sys.executable, str(WORKER), str(folder), json.dumps(stages), *options], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline().startswith("ready")
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit status, lines of output and errors of a process that ends by itself."""
    out, error = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), error


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it does not happen")


def calls(folder: Path) -> list[list[str]]:
    """[job, start or end, pid of the study's process, pid of the job], in their order."""
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def one(name: str, code: str = "pass") -> Stages:
    return [{"jobs": 1, "chains": [[[name, code]]]}]


def test_three_processes_run_every_job_once_and_stage_after_stage(tmp_path: Path) -> None:
    short = "time.sleep(0.2)"
    chains = [[[f"train{i}", short], [f"eval{i}", short]] for i in range(6)]
    stages: Stages = [{"jobs": 1, "chains": [[["prepare", "time.sleep(2)"]]]}, {"jobs": 2, "chains": chains},
                      {"jobs": 2, "chains": [[["extend0", short]], [["extend1", short]]]},
                      {"jobs": 1, "chains": [[["bench0", short], ["bench1", short]]]}]
    processes = [start(tmp_path, stages) for _ in range(3)]
    ended = [end(process) for process in processes]
    assert [(status, error) for status, _, error in ended] == [(0, "")] * 3
    done = calls(tmp_path)
    names = [name for stage in stages for chain in stage["chains"] for name, _ in chain]  # type: ignore[attr-defined]
    assert Counter((name, what) for name, what, *_ in done) == Counter((n, w) for n in names for w in ("start", "end"))
    # more than one process worked, and a chain stays with the one that took it
    by = {name: pid for name, _, pid, _ in done}
    assert len({by[f"train{i}"] for i in range(6)}) > 1
    assert all(by[f"train{i}"] == by[f"eval{i}"] for i in range(6))
    assert len({by["bench0"], by["bench1"]}) == 1
    order = [(what, stage) for name, what, *_ in done
             for stage in (("prepare", "train", "extend", "bench").index(name.rstrip("0123456789").replace(
                 "eval", "train")),)]
    assert [stage for _, stage in order] == sorted(stage for _, stage in order)
    # each tells of every job: its own, or another's
    told = Counter(line for _, out, _ in ended for line in out if not line.startswith("waits"))
    for name in names:
        assert (told[f"{name} finished"], told[f"{name} elsewhere"]) == (1, 2)
    assert not list((tmp_path / ".claims").glob("*.lock"))


def test_a_later_process_prepares_again_and_finds_the_rest_done(tmp_path: Path) -> None:
    stages = one("prepare") + one("train")
    assert end(start(tmp_path, stages))[:2] == (0, ["prepare finished", "train finished"])
    assert end(start(tmp_path, stages))[:2] == (0, ["prepare finished", "train reused"])


def test_what_a_killed_process_had_is_taken_over_at_once_on_its_machine(tmp_path: Path) -> None:
    killed = start(tmp_path, one("long", FIRST_TIME))
    until((tmp_path / "ready").exists)
    other = start(tmp_path, one("long", FIRST_TIME))
    assert other.stdout
    assert other.stdout.readline() == "waits long is another process's\n"
    killed.kill()
    killed.communicate()
    assert end(other)[:2] == (0, ["long finished"])
    os.kill(int(calls(tmp_path)[0][3]), signal.SIGKILL)  # the job that the killed one has left behind


def test_what_a_process_of_another_machine_had_is_taken_over_when_it_has_not_answered(tmp_path: Path) -> None:
    """Its number tells nothing here: only that its claim is not renewed. So it is in a folder that was copied, too."""
    killed = start(tmp_path, one("long", FIRST_TIME), "2", "elsewhere")
    until((tmp_path / "ready").exists)
    other = start(tmp_path, one("long", FIRST_TIME) + one("next"), "2")
    time.sleep(3)  # longer than the lease: it is renewed
    assert [name for name, *_ in calls(tmp_path)] == ["long"]
    killed.kill()
    killed.communicate()
    since = time.monotonic()
    status, out, _ = end(other)
    assert (status, out[-2:]) == (0, ["long finished", "next finished"])
    assert 0.5 < time.monotonic() - since < 30
    os.kill(int(calls(tmp_path)[0][3]), signal.SIGKILL)


def test_a_failure_ends_all_processes_with_its_message_and_lets_the_others_save(tmp_path: Path) -> None:
    other = start(tmp_path, one("long", SAVES))
    until((tmp_path / "ready").exists)
    failing = start(tmp_path, one("bad", "print('no such thing'); sys.exit(3)"))
    status, _, error = end(failing)
    assert status == 1
    assert error.startswith("bad failed with exit status 3. The end of its log:\n  no such thing\n")
    status, _, message = end(other)
    assert status == 1
    assert message == f"Another process of this study failed: {error}"
    assert (tmp_path / "saved").exists()
    # of no matter to who begins after it
    assert end(start(tmp_path, one("good")))[0] == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_saves_and_leaves_its_work_to_the_others(tmp_path: Path, sent: signal.Signals) -> None:
    stopped = start(tmp_path, one("long", FIRST_TIME), "60", "elsewhere")
    until((tmp_path / "ready").exists)
    other = start(tmp_path, one("long", FIRST_TIME))
    stopped.send_signal(sent)
    assert end(stopped)[0] == 130
    assert (tmp_path / "saved").exists()
    status, out, _ = end(other)
    assert (status, out[-1]) == (0, "long finished")


def test_a_process_that_lost_its_claim_ends_the_job_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, one("long", FIRST_TIME), "0.9")
    until((tmp_path / "ready").exists)
    (claim,) = (tmp_path / ".claims").glob("*.lock")
    claim.unlink()
    status, out, _ = end(process)
    assert (status, out[-1]) == (0, "long finished")
    assert "did not answer for" in out[0]
    assert not (tmp_path / "saved").exists()
    assert [what for _, what, *_ in calls(tmp_path)] == ["start", "start", "end"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(calls(tmp_path)[0][3]), 0)


def test_a_training_that_its_study_left_behind_is_waited_for(tmp_path: Path) -> None:
    with Run(tmp_path / "run1").lock():
        process = start(tmp_path, one("run1"))
        assert process.stdout
        assert process.stdout.readline() == \
            f"waits run1 goes on in process {os.getpid()}, whose study has ended\n"
        assert not (tmp_path / "calls").exists()
    assert end(process)[:2] == (0, ["run1 finished"])


def test_a_mark_counts_from_the_next_start_on(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.due("report")
    with first.holding("report"):
        assert not second.take("report")
        first.mark("report")
    assert not second.due("report")
    assert Claims(tmp_path).due("report")


def test_failures_end_who_was_there_and_are_forgotten_by_who_gets_past_them(tmp_path: Path) -> None:
    there, other = Claims(tmp_path), Claims(tmp_path)
    other.take("x")
    other.fail("x failed.")
    with pytest.raises(FailedElsewhere, match=r"^Another process of this study failed: x failed\.$"):
        there.check()
    later = Claims(tmp_path)
    later.check()
    later.forget_failures()
    assert not list((tmp_path / ".claims").glob("failed*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(share.RunError, match=r"file cannot be used as a study's folder: Not a directory"):
        Claims(tmp_path / "file").take("x")
