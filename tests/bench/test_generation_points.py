"""The sweep of `hinny bench generate --recipe`: its rows, what it keeps, and points that memory does not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hinny import predict
from hinny.bench import generation_points
from hinny.bench.generation_points import Sweep, Where
from hinny.bench.generation_rows import Point, point_of
from hinny.config import load_recipe

HYBRID = load_recipe("8b-hybrid")
H100 = Where(torch.device("cpu"), "NVIDIA H100 80GB HBM3", 1, 3e12, True, 80 * 10 ** 9)


class Clock:
    """A side whose steps take 10 ms and whose prompts take a second; it says what it was asked for."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.fails, self.asked = fails, []

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        self.asked.append((batch, context))
        if context in self.fails:
            raise torch.OutOfMemoryError("tried to allocate 1 PiB\nand more")
        return [0.010, 0.008, 0.012]

    def prefill(self, length: int, repeats: int) -> list[float]:
        self.asked.append(length)
        return [1.0, 2.0]

    def answer(self, batch: int, length: int, tokens: int, repeats: int) -> list[float]:
        self.asked.append((batch, length))
        return [4.0]

    def free(self) -> None:
        pass


class Slow:
    name = "a peer"

    def context(self, asked: int) -> int:
        return min(asked, 512)

    def decode(self, batch: int, context: int, tokens: int) -> list[float]:
        return [0.040]


@pytest.fixture(autouse=True)
def _at_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_points, "commit", lambda: "0123abc")
    monkeypatch.setattr("hinny.run.commit", lambda: "0123abc")
    monkeypatch.setattr(predict, "CALIBRATED", {})


def sweep(ours: Clock, where: Where = H100, **options: object) -> Sweep:
    return Sweep(HYBRID, ours, where, precision="bf16", state="fp32", tokens=8, piece=2048, **options)


def rows_of(made: Sweep) -> dict[str, dict]:
    return {row["what"]: row for row in made.made}


def test_a_decode_point_stands_beside_its_floor_and_its_prediction() -> None:
    made = sweep(Clock())
    made.decode(32, 16384)
    rows = rows_of(made)
    # weights of 15.2 GB, 16 KiB a token of keys, 24 layers of 128 x 64 x 128 states and 3 x 10240 inputs in float32
    by_hand = 32 * 16384 * 16384 + 2 * 32 * 4 * 24 * (128 * 64 * 128 + 3 * 10240)
    weights = 2 * (HYBRID_TOTAL - VOCABULARY * 4096)
    assert rows["decode.bytes"]["value"] == weights + by_hand
    assert rows["decode.bytes"]["value"] == predict.decode_bytes(HYBRID.model, 32, 16384)
    decode = rows["decode"]
    assert (decode["low"], decode["value"], decode["high"]) == pytest.approx((32 / 0.012, 3200, 4000))
    assert decode["bound"] == pytest.approx(32 * 3e12 / (weights + by_hand))
    assert rows["decode.floor_share"]["value"] == pytest.approx(decode["value"] / decode["bound"])
    error = rows["decode.error"]
    assert error["peer_value"] == pytest.approx(32 * 3.35e12 / (weights + by_hand))
    assert error["value"] == pytest.approx(error["peer_value"] / 3200 - 1)
    assert error["peer"] == "hinny show, data sheet"
    assert "weights=random" in decode["shape"]
    assert "filled=random" in decode["shape"]


HYBRID_TOTAL, VOCABULARY = 8_654_517_248, 256_000
PROJECTIONS = 24 * 4096 * (2 * 8192 + 2 * 1024 + 8192) + 4 * 4096 * (2 * 4096 + 2 * 1024) + 28 * 2 * 4096 * 16384
"""Numbers of the hybrid's matrices: z, x, B, C, out; q, out, k, v; up and down."""


def test_shorter_states_leave_the_convolutions_in_float32() -> None:
    wide, half = (Point(HYBRID.model, 32, 1024, "bf16", state, 1, None) for state in ("fp32", "bf16"))
    states = 32 * 24 * 2 * 128 * 64 * 128
    assert wide.bytes - half.bytes == 2 * states  # read and written
    assert wide.memory(8) - half.memory(8) == states


def test_shorter_weights_leave_keys_embedding_and_head_in_bfloat16() -> None:
    plain, short = (Point(HYBRID.model, 32, 1024, kind, "fp32", 1, None) for kind in ("bf16", "int8"))
    assert plain.width == short.width == 2
    # scales and what is float32 either way are a thousandth
    assert plain.bytes - short.bytes == pytest.approx(PROJECTIONS, rel=2e-3)
    assert plain.memory(8) - short.memory(8) == pytest.approx(PROJECTIONS, rel=2e-3)


def test_a_calibrated_device_is_predicted_by_its_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(predict.CALIBRATED, "H100", predict.Calibration(0.9, 1e-5, None, "a test"))
    made = sweep(Clock())
    made.decode(1, 1024)
    error = rows_of(made)["decode.error"]
    assert error["peer"] == "hinny show, calibrated"
    assert error["peer_value"] == pytest.approx(
        1 / (predict.decode_bytes(HYBRID.model, 1, 1024) / (0.9 * 3.35e12) + 56 * 1e-5))


def test_points_in_the_file_are_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first = sweep(Clock(), save=file)
    first.decode(1, 1024)
    first.prefill(4096)
    again = Clock()
    resumed = sweep(again, save=file)
    for batch, context in ((1, 1024), (2, 1024)):
        resumed.decode(batch, context)
    resumed.prefill(4096)
    assert again.asked == [(2, 1024)]
    assert {row["shape"] for row in resumed.made} >= {row["shape"] for row in first.made}
    assert len(json.loads(file.read_text())) == len(resumed.made)


@pytest.mark.parametrize("other", ["another commit", "changes", "machine", "peer"])
def test_a_point_of_other_code_machine_or_peer_is_measured_again(tmp_path: Path, other: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    commit = "0123abc+changes" if other == "changes" else "0123abc"
    for module in ("hinny.run", "hinny.bench.generation_points"):
        monkeypatch.setattr(f"{module}.commit", lambda: commit)
    sweep(Clock(), save=file).decode(1, 1024)
    if other == "another commit":
        for module in ("hinny.run", "hinny.bench.generation_points"):
            monkeypatch.setattr(f"{module}.commit", lambda: "fedcba9")
    again = Clock()
    where = replace(H100, name="NVIDIA H200") if other == "machine" else H100
    sweep(again, where, save=file, peer=Slow() if other == "peer" else None).decode(1, 1024)
    assert again.asked == [(1, 1024)]


def test_a_point_that_cannot_fit_is_recorded_and_not_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    made = sweep(clock, replace(H100, room=20 * 10 ** 9), save=tmp_path / "rows.json")
    made.decode(64, 131072)
    made.decode(1, 1024)
    assert clock.asked == [(1, 1024)]
    (skipped,) = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["what"] == "decode.skipped"]
    # pages of 64 tokens: the last 8 tokens need one more
    needed = 2 * HYBRID_TOTAL + 64 * ((131072 + 64) * 16384 + 4 * 24 * (128 * 64 * 128 + 3 * 10240))
    assert skipped["value"] == pytest.approx(needed / 1e9)
    assert skipped["bound"] == 20.0
    assert "skipped context=131072 batch=64" in caplog.text


def test_memory_that_runs_out_ends_its_point_alone(caplog: pytest.LogCaptureFixture) -> None:
    made = sweep(Clock(fails=(4096,)))
    for context in (1024, 4096, 16384):
        made.decode(1, context)
    assert [point_of(row).context for row in made.made if row["what"] == "decode"] == [1024, 16384]
    assert [point_of(row).context for row in made.made if row["what"] == "decode.skipped"] == [4096]
    assert "out of memory: tried to allocate 1 PiB" in caplog.text


def test_memory_that_runs_out_in_one_of_many_processes_ends_them_all() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        sweep(Clock(fails=(1024,)), replace(H100, processes=2)).decode(1, 1024)


def test_each_of_two_gpus_moves_half_of_the_bytes() -> None:
    one, two = sweep(Clock()), sweep(Clock(), replace(H100, processes=2))
    for made in (one, two):
        made.decode(32, 4096)
    assert rows_of(one)["decode.bytes"]["value"] == 2 * rows_of(two)["decode.bytes"]["value"]
    assert "tensor=2 gpus=2" in rows_of(two)["decode"]["shape"]
    assert point_of(rows_of(two)["decode"]).tensor == 2


def test_the_peer_of_a_shorter_context_says_so() -> None:
    made = sweep(Clock(), peer=Slow())
    made.decode(8, 16384)
    decode = rows_of(made)["decode"]
    assert (decode["peer"], decode["peer_value"], decode["ratio"]) == ("a peer, context 512", 200, pytest.approx(4))


def test_prefill_and_answers_are_rates_of_all_tokens() -> None:
    made = sweep(Clock())
    made.prefill(4096)
    made.answer(512, 4)
    rows = rows_of(made)
    assert rows["prefill"]["value"] == pytest.approx((4096 + 2048) / 2)
    # the share of the peak, of the arithmetic of a prompt whose last token alone needs the head
    seconds = predict.prefill(HYBRID.model, predict.HARDWARE["H100"], batch=1, context=4096, mfu=1.0)["seconds"]
    assert rows["prefill.mfu"]["high"] == pytest.approx(seconds / 1.0)
    assert rows["answer"]["value"] == 4 * 8 / 4.0
