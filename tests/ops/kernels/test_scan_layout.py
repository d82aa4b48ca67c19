"""The scan's kernels keep a channel in a lane and its states in that lane's registers: no one tells the compiler so,
and without it they take ten times as long."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from hinny.ops.kernels import scan
from hinny.ops.kernels.compile import compile_for

CASES = {case.name: case for case in scan.compilations("sm90")}


@pytest.mark.parametrize(("name", "loads", "exchanges"), [
    ("scan_walk-0-forward", 64, 0), ("scan_walk_back-0-edges", 32, 0), ("scan_walk-1-forward", 64, 16),
    ("scan_gradients-0-all", 0, 32)])
def test_lanes_exchange_nothing_but_their_sums(name: str, loads: int, exchanges: int) -> None:
    """8 tokens of a walk read 16 states of B, and C, 4 numbers at a time; sums are over 4 warps, and of dB and dC."""
    assembly = compile_for("sm90", CASES[name]).assembly["ptx"]
    assert assembly.count("ld.global.v4.b32") == loads
    assert assembly.count("shfl.sync") == exchanges
