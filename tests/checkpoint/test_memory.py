"""Conversions keep their memory below a file, both ways."""

import subprocess
import sys
from pathlib import Path

import fake_large
import pytest

MEASURE = """
import sys, threading, time
from pathlib import Path
sys.path[:0] = {path!r}
import fake_large
from hinny.checkpoint import convert, formats
sys.modules["hinny.checkpoint.formats.large"] = fake_large
formats.FORMATS["large"] = "large"

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.01)

folder = Path({folder!r})
for source, target, options in {steps!r}:
    seen, done = [anonymous()], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    record = convert.convert(folder / source, folder / target, **options)
    done.set()
    thread.join()
    print(max(seen) - seen[0], record["bytes"])
"""

PLANNED = {"shard_bytes": 2**25}
STEPS = [("source", "run", {"format": "large", **PLANNED}), ("run", "out", {"to": "large", **PLANNED}),
         ("run", "ranks", {"to": "megatron", "tp": 2}), ("ranks", "back", {"format": "megatron", **PLANNED})]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts memory as Linux tells it")
def test_memory_stays_below_a_file_both_ways(tmp_path):
    """A model of 80 MB in files of 32 MB, or of two ranks; all memory is counted that is not a mapped file."""
    largest = fake_large.write(tmp_path / "source")
    here = Path(__file__).parent
    code = MEASURE.format(path=[str(here.parent), str(here)], folder=str(tmp_path), steps=STEPS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(STEPS)
    for line in lines:
        peak, size = map(int, line.split())
        assert size > 80e6
        assert peak < 1.3 * largest
