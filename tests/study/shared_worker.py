"""One process of a made-up study whose jobs are lines of Python: `shared_worker.py FOLDER PLAN [LEASE [HOST]]`.

PLAN is stages as JSON: a list of {"jobs": chains at a time, "chains": [[[name, code], ...], ...]}. Each job writes
"NAME start" and "NAME end", with the number of the study's process and its own, to FOLDER/calls, around its code. The
job prepare is run always.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from hinny.errors import RunError
from hinny.study import execute, plan, share
from hinny.study.devices import find_devices
from hinny.study.plan import Job, Stage

CODE = """
import os, pathlib, sys, time
folder = pathlib.Path({folder!r})
def call(what):
    with open(folder / "calls", "a") as calls: calls.write(f"{name} {{what}} {{os.getppid()}} {{os.getpid()}}\\n")
call("start")
{code}
(folder / "{name}.done").touch()
call("end")
"""


def job(folder: Path, name: str, code: str) -> Job:
    """The job, which is done when its file is there; one with "run" in its name trains in a run directory."""
    text = CODE.format(folder=str(folder), name=name, code=code)
    return Job(name, (text,), (folder / f"{name}.done").is_file, folder / "logs" / f"{name}.log",
               folder / name if "run" in name else None, always=name == "prepare")


class Teller:
    """Prints what happens to the jobs; why nothing does, once."""

    said = ""

    def started(self, job: Job) -> None: ...
    def tick(self) -> None: ...

    def finished(self, job: Job, seconds: float) -> None:
        print(f"{job.name} finished", flush=True)

    def reused(self, job: Job, elsewhere: bool = False) -> None:
        print(f"{job.name} {'elsewhere' if elsewhere else 'reused'}", flush=True)

    def waits(self, why: str) -> None:
        if why != self.said:
            print(f"waits {why}", flush=True)
        self.said = why


def main(folder: Path, stages: str, lease: float = 60.0, host: str = "") -> None:
    plan.PROGRAM = (sys.executable, "-c")
    execute.LOOK, share.LEASE = 0.1, lease
    if host:
        socket.gethostname = lambda: host
    claims = share.Claims(folder)
    print("ready", os.getpid(), flush=True)
    runner = execute.Stages(Teller(), claims, find_devices(2))
    try:
        runner.run([Stage([[job(folder, *named) for named in chain] for chain in one["chains"]], one["jobs"])
                    for one in json.loads(stages)])
    except KeyboardInterrupt:
        sys.exit(130)
    except RunError as fault:
        print(fault, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:4]), *sys.argv[4:5])
