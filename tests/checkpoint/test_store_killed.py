"""kill -9 at any moment of a save, of one rank or of the only process, leaves the last good checkpoint in force."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What killed_saves.py saw."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))
    done = subprocess.run([sys.executable, here / "killed_saves.py", str(tmp_path_factory.mktemp("killed"))],
                          env=os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_others_of_a_killed_rank_say_so_and_the_last_good_checkpoint_is_in_force(found):
    pairs = found["pairs"]
    assert pairs["codes"] == [0, -9, -9, 0]
    for said in pairs["said"]:
        assert "checkpoint of step 4 could not be written" in said
        assert "another rank is gone" in said
        assert "good checkpoint is step-00000002." in said
    for number in (0, 1):
        assert pairs[f"differ {number}"] == []
        assert pairs[f"folders {number}"] == ["step-00000002"]


def test_killed_before_any_of_the_things_that_a_save_does_to_a_file_a_whole_checkpoint_is_in_force(found):
    moments = found["moments"]
    assert moments["wrong"] == []
    assert moments["left"] == []
    before, after = moments["steps"].count(4), moments["steps"].count(6)
    assert moments["steps"] == [4] * before + [6] * after
    # before: the folder, its files and their checksums, meta.json, the rename; after: the old one's files go
    assert before > 8
    assert after > 4
