"""Jobs as processes: order, reuse, failure, interruption; and the verb from end to end on a stand-in program."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hinny.errors import RunError
from hinny.run import Run
from hinny.study import conduct, plan
from hinny.study.devices import Devices
from hinny.study.execute import Stages
from hinny.study.plan import Job, Stage
from hinny.study.progress import Display, Tail, note
from hinny.study.share import Claims


class Recorder:
    """Remembers what happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def started(self, job: Job) -> None:
        self.events.append(f"started {job.name}")

    def finished(self, job: Job, seconds: float) -> None:
        self.events.append(f"finished {job.name}")

    def reused(self, job: Job, elsewhere: bool = False) -> None:
        self.events.append(f"reused {job.name}")

    def waits(self, why: str) -> None: ...

    def tick(self) -> None: ...


@pytest.fixture(autouse=True)
def _python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PROGRAM", (sys.executable, "-c"))


def job(folder: Path, name: str, code: str = "pass") -> Job:
    mark = folder / f"{name}.done"
    return Job(name, (f"import sys, pathlib, time\n{code}\npathlib.Path({str(mark)!r}).touch()",), mark.is_file,
               folder / "logs" / f"{name}.log")


def run_stage(folder: Path, stage: Stage, watcher: Recorder) -> None:
    Stages(watcher, Claims(folder), Devices()).run([stage])


def test_chains_run_side_by_side_and_their_jobs_in_order(tmp_path: Path) -> None:
    # each first job waits for the other chain's first job: alone, neither would end
    wait = "while not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    chains = [[job(tmp_path, f"{one}1", f"pathlib.Path({str(tmp_path / one)!r}).touch()\n"
                   + wait.format(str(tmp_path / other))), job(tmp_path, f"{one}2")] for one, other in ("ab", "ba")]
    seen = Recorder()
    run_stage(tmp_path, Stage(chains, 2), seen)
    for one in "ab":
        order = [e for e in seen.events if one in e.split()[1]]
        assert order == [f"started {one}1", f"finished {one}1", f"started {one}2", f"finished {one}2"]


def test_what_is_done_is_reused(tmp_path: Path) -> None:
    chain = [job(tmp_path, "a"), job(tmp_path, "b")]
    (tmp_path / "a.done").touch()
    seen = Recorder()
    run_stage(tmp_path, Stage([chain], 1), seen)
    assert seen.events == ["reused a", "started b", "finished b"]


def test_a_job_that_runs_always_is_run_though_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "a.done").touch()
    seen = Recorder()
    run_stage(tmp_path, Stage([[dataclasses.replace(job(tmp_path, "a"), always=True)]], 1), seen)
    assert seen.events == ["started a", "finished a"]


def test_a_log_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the folder's place")
    with pytest.raises(RunError, match=r"logs/a\.log cannot be written: (File exists|Not a directory)"):
        run_stage(tmp_path, Stage([[job(tmp_path, "a")]], 1), Recorder())


def test_a_failing_job_shows_the_end_of_its_log_and_stops_the_others(tmp_path: Path) -> None:
    saves = f"""
try: time.sleep(60)
except KeyboardInterrupt: pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit(130)"""
    ready = f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()" + saves
    fails = f"""
while not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(0.01)
time.sleep(0.1)
for i in range(40): print('line', i)
sys.exit(3)"""
    with pytest.raises(RunError, match="bad failed with exit status 3") as failure:
        run_stage(tmp_path, Stage([[job(tmp_path, "good", ready)], [job(tmp_path, "bad", fails)]], 2), Recorder())
    message = str(failure.value)
    assert "line 39" in message
    assert "line 24" not in message
    assert str(tmp_path / "logs" / "bad.log") in message
    assert (tmp_path / "saved").exists()


def test_a_job_that_writes_nothing_is_a_failure(tmp_path: Path) -> None:
    idle = Job("idle", ("pass",), lambda: False, tmp_path / "idle.log")
    with pytest.raises(RunError, match="did not write what it should"):
        run_stage(tmp_path, Stage([[idle]], 1), Recorder())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_lets_its_jobs_save(tmp_path: Path, sent: signal.Signals) -> None:
    code = f"""pathlib.Path({str(tmp_path / 'ready')!r}).touch()
try: time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.2); pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit(130)"""

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), sent)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, Stage([[job(tmp_path, "long", code)]], 1), Recorder())
    thread.join()
    assert (tmp_path / "saved").exists()


def test_progress_follows_a_run_that_is_cut_back_and_resumed(tmp_path: Path) -> None:
    run, tail = Run(tmp_path), Tail(tmp_path)
    assert tail.read() == {}
    record = {"tokens": 100, "loss": 2.0, "tokens_per_s": 50.0}
    run.log({"step": 1, **record})
    run.log({"step": 2, **record})
    assert tail.read()["step"] == 2
    run.keep_metrics(1)
    assert tail.read()["step"] == 1
    run.log({"step": 2, "tokens": 100, "held_out_loss": 1.0})
    assert tail.read()["step"] == 1


def test_time_left_follows_from_speed() -> None:
    record = {"step": 10, "tokens": 1000, "loss": 2.0, "tokens_per_s": 100.0}
    assert note(record, steps=100) == "loss 2.000  100 tokens/s  1:30 left"


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(force_terminal=False, width=200)
    with console.capture() as output, Display(console, total=2) as display:
        one = job(tmp_path, "train x")
        display.started(one)
        display.tick()
        display.finished(one, 3.0)
        display.reused(job(tmp_path, "eval x"))
    assert output.get().splitlines() == ["train x: started", "[1/2] train x: 3 s", "[2/2] eval x: reused"]


STAND_IN = """
import json, shutil, sys
from pathlib import Path
done, argv = Path({done!r}), sys.argv[1:]
with open({calls!r}, "a") as calls: calls.write(" ".join(argv) + "\\n")
def take(part, folder):
    source = done / part
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, dirs_exist_ok=True)
if argv[0] == "prepare": take("data", argv[1])
elif argv[0] == "train": take("runs/" + Path(argv[argv.index("--out") + 1]).name, argv[argv.index("--out") + 1])
print("hello from", argv[0])
"""


def test_a_study_runs_to_its_report_and_a_second_start_reuses_everything(
        tmp_path: Path, study_file: Path, study_folder: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    program, calls = tmp_path / "stand_in.py", tmp_path / "calls"
    program.write_text(STAND_IN.format(done=str(study_folder), calls=str(calls)))
    monkeypatch.setattr(plan, "PROGRAM", (sys.executable, str(program)))
    page = conduct.study(study_file, out=tmp_path / "out", jobs=4)
    assert page == tmp_path / "out" / "report.html"
    assert page.stat().st_size > 50_000
    first = calls.read_text().splitlines()
    # the stand-in's trainings bring their evaluations and timings along
    assert [line.split()[0] for line in first] == ["prepare"] + ["train"] * 8
    out = capsys.readouterr().out
    assert "Held-out loss (nats/token)" in out
    assert out.rstrip().endswith(f"Report: {page}")
    again = conduct.study(study_file, out=tmp_path / "out", jobs=4)
    assert again.read_text() == page.read_text()
    # prepare alone is asked again: it tells whether the text is still the same
    assert calls.read_text().splitlines() == [*first, first[0]]
    assert "train tiny-hybrid s2: reused" in capsys.readouterr().out


def test_an_interrupted_study_tells_how_to_go_on(
        tmp_path: Path, study_file: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "run", interrupted)
    with pytest.raises(SystemExit) as end:
        conduct.study(study_file, out=tmp_path / "out")
    assert end.value.code == 130
    assert "goes on from there" in capsys.readouterr().out


def test_the_study_imports_no_torch() -> None:
    code = ("import sys, hinny.study.conduct, hinny.study.report; "
            "assert 'torch' not in sys.modules, 'torch was imported'")
    subprocess.run([sys.executable, "-c", code], check=True)
