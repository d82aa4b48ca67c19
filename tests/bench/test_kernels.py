"""`hinny bench kernels` without a GPU: its cases and its peer compute what they should, it times nothing that is wrong,
and its figures are what was measured."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from hinny import ops
from hinny.bench import bench, gpu_clock, kernel_check, kernel_peers, kernels
from hinny.bench.gpu_clock import Roofs, Timing
from hinny.bench.kernel_cases import Case, all_cases, conv, decode, loss, norm, scan, ssd, transformer
from hinny.bench.kernel_cases.case import Draw, Outputs
from hinny.bench.kernel_check import check, results_of
from hinny.bench.kernel_table import read_rows, render_table
from hinny.errors import BackendError, ConfigError

CPU = torch.device("cpu")
SIZES = dict(b=2, t=9, h=4, p=8, g=2, n=8)
STEP = {key: value for key, value in SIZES.items() if key != "t"}
SMALL = [
    *(build(SIZES, 4, backward=backward) for build in (ssd.ssd_case, ssd.mixer_case) for backward in (False, True)),
    ssd.prefill_case(SIZES, 4),
    *(build(backward=backward, **sizes) for backward in (False, True) for build, sizes in (
        (conv.conv_case, dict(b=2, t=9, ch=12)), (norm.gated_case, dict(rows=5, d=12, group_size=6)),
        (norm.plain_case, dict(rows=5, d=12)), (scan.scan_case, dict(b=2, t=9, d=6, n=4)),
        (transformer.rope_case, dict(b=2, t=9, h=3, p=8, rope_dim=4)),
        (transformer.attention_case, dict(b=2, t=9, h=4, g=2, p=8, document=4)),
        *((build, dict(rows=5, d=12)) for build in (transformer.layer_norm_case, transformer.relu2_case,
                                                    transformer.swiglu_case)))),
    *(loss.loss_case(rows=5, d=6, v=11, training=training) for training in (False, True)),
    decode.update_case(STEP, "fp32"), decode.update_case(STEP, "bf16"),
    decode.update_case(STEP, "fp16", stochastic=True), decode.replay_case(STEP, "fp32"), decode.mixer_case(STEP)]
ROOFS = Roofs(Timing(2e-3, 1e-3, 4e-3, "graph"), Timing(2e-3, 1e-3, 4e-3, "graph"), 3e12, 700e12, "add")


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain forms stand in for the kernels."""
    plain: Callable[[str], AbstractContextManager] = lambda name: ops.use_backend("torch")  # noqa: E731
    for module in (kernel_check, kernels):
        monkeypatch.setattr(module, "use_backend", plain)
    monkeypatch.setattr(kernels, "_gpu", lambda device: "a GPU")


class Twin(kernel_peers.MambaSSM):
    """A peer that is ours; what its functions are given is checked by the results."""

    def __init__(self) -> None:
        self.name = "twin 1"

    def ssd(self, x, dt, A, B, C, D, dt_bias, *, chunk_len, final=False):
        y, state = ops.ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, chunk_len=chunk_len)
        return (y, state) if final else y

    def gated_rms_norm(self, x, z, weight, eps, group_size):
        return ops.gated_rms_norm(x, z, weight, eps, group_size)

    def ssd_update(self, state, x, dt, A, B, C, D, dt_bias):
        y, state[:] = ops.ssd_step(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, initial_state=state)
        return y


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name.replace(" ", "-"))
def test_a_case_calls_the_op_and_the_peer_with_the_same(case: Case, plain_kernels: None) -> None:
    error, peer_error = check(case, Twin() if case.peer else None, CPU)
    assert 0 < error <= case.tolerance or case.what == "loss.forward"
    assert (peer_error is None) == (case.peer is None or bool(case.peer_lacks))
    assert peer_error is None or peer_error <= case.tolerance
    if case.peer:
        # also where the results are not compared, the peer takes the inputs that the case has
        inputs = case.inputs(Draw(CPU, 0))
        assert kernel_check.work_of(case, case.of_peer(Twin()), inputs, lacking=bool(case.peer_lacks))() is not None


def test_gradients_of_a_case_are_those_of_its_first_output() -> None:
    case = norm.plain_case(rows=4, d=6, backward=True)
    inputs = case.inputs(Draw(CPU, 5))
    leaves = [inputs[name].clone().requires_grad_() for name in ("x", "weight")]
    y = ops.rms_norm(*leaves, 1e-5)
    given = Draw(CPU, 1).normal(4, 6)
    expected = torch.autograd.grad(y, leaves, given)
    found = results_of(case, case.ours, inputs)
    assert torch.equal(found["the gradient of x"], expected[0])
    assert torch.equal(found["the gradient of weight"], expected[1])
    assert not inputs["x"].requires_grad


def test_updates_leave_the_inputs_of_a_check_as_they_are_and_are_compared() -> None:
    case = decode.update_case(STEP, "fp32")
    inputs = case.inputs(Draw(CPU, 5))
    before = inputs["state"].clone()
    found = results_of(case, case.ours, inputs)
    assert torch.equal(inputs["state"], before)
    assert not torch.equal(found["the new state"], before)


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_update_that_leaves_the_state_as_it_was_is_refused(stochastic: bool, plain_kernels: None) -> None:
    case = decode.update_case(STEP, "fp16", stochastic=stochastic)

    def forgetful(state: torch.Tensor, **rest: torch.Tensor) -> Outputs:
        return case.ours(state if state.dtype == torch.float32 else state.clone(), **rest)

    with pytest.raises(BackendError, match="the new state differs from the plain form"):
        check(dataclasses.replace(case, ours=forgetful), None, CPU)


def test_every_case_has_a_name_of_its_own_a_bound_and_known_inputs() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases) > 20
    for case in cases:
        assert case.moved > 0, case.name
        assert case.unit in ("ms", "TB/s"), case.name
        assert all(len(part.split("=")) == 2 for part in case.shape.split()), case.name


def test_the_floors_of_the_8b_layer_are_those_counted_by_hand() -> None:
    """0.20 ms of bytes for the forward, 0.13 ms of operations, at 3.02 TB/s and 690 TFLOP/s."""
    found = {case.name.split(" peer")[0]: case for case in all_cases()}
    forward = found["ssd.forward b=4 t=4096 h=128 p=64 g=8 n=128"]
    assert forward.moved / 3.02e12 * 1e3 == pytest.approx(0.20, abs=0.005)
    assert forward.flops / 690e12 * 1e3 == pytest.approx(0.13, abs=0.005)
    update = next(case for case in all_cases() if case.name == "ssd_update b=128 h=128 p=64 g=8 n=128 state=fp32")
    assert update.moved == pytest.approx(2 * 4 * 128 * 128 * 64 * 128, rel=0.01)


def _wrong(kind: str) -> Case:
    """A case whose kernel is wrong where its inputs are bfloat16; its plain form is x in float32."""
    calls: list[int] = []

    def crash(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of registers\nand more")

    def ours(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return x.clone()
        calls.append(0)
        changed = x.clone()
        if kind == "value":
            changed[0] *= 2
        if kind == "nan":
            changed[3] = torch.nan
        if kind == "restless":
            changed[1] *= 1 + 2 ** -7 * (len(calls) % 2)
        return changed

    return Case("wrong", f"kind={kind}", lambda draw: {"x": draw.normal(64)}, crash if kind == "crash" else ours,
                moved=1.0)


@pytest.mark.parametrize(("kind", "message"), [
    ("value", "output 0 differs from the plain form by"), ("nan", "by nan, more than"),
    ("restless", "output 0 has other bits when it is computed again")])
def test_a_kernel_that_is_wrong_is_refused(kind: str, message: str, plain_kernels: None) -> None:
    with pytest.raises(BackendError, match=message):
        check(_wrong(kind), None, CPU)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side, whatever it does, takes 2 ms, the next 3 ms."""
    def timed(sides: list[list[Callable]]) -> list[Timing]:
        return [Timing(m * 1e-3, m * 0.5e-3, m * 4e-3, "graph") for m, _ in enumerate(sides, start=2)]

    monkeypatch.setattr(kernels, "time_in_turn", timed)
    monkeypatch.setattr(kernels, "ROTATED", 1.0)


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_rows_say_speed_bound_peer_and_error_and_a_red_kernel_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    gated = norm.gated_case(rows=5, d=12, group_size=6, backward=False)
    cases = [_wrong("value"), ssd.ssd_case(SIZES, 4, backward=True), gated,
             conv.conv_case(b=2, t=9, ch=12, backward=True), _wrong("crash")]
    rows, red = kernels.time_cases(cases, Twin(), ROOFS, CPU, file)
    assert len(red) == 2
    assert "wrong kind=value: output 0 differs" in red[0]
    assert red[1] == "wrong kind=crash: RuntimeError out of registers"
    assert [r["what"] for r in rows] == ["roof.memory", "roof.matmul", "ssd.backward", "ssd.backward.error",
                                         "gated_norm.forward", "gated_norm.forward.error", "conv.backward",
                                         "conv.backward.error"]
    by = {r["what"]: r for r in rows}
    assert [by["roof.memory"][key] for key in ("value", "low", "high")] == pytest.approx([3, 1.5, 6])
    assert "way=add" in by["roof.memory"]["shape"]
    timed = by["ssd.backward"]
    assert (timed["value"], timed["low"], timed["high"], timed["peer_value"]) == pytest.approx((2, 1, 8, 3))
    assert (timed["unit"], timed["peer"], timed["ratio"]) == ("ms", "twin 1", pytest.approx(1.5))
    assert timed["bound"] == pytest.approx(max(cases[1].moved / 3e9, cases[1].flops / 700e9))
    assert "a GPU" in timed["machine"]
    moved = by["gated_norm.forward"]
    assert (moved["unit"], moved["bound"], moved["ratio"]) == ("TB/s", pytest.approx(3), pytest.approx(1.5))
    assert (moved["low"], moved["high"]) == pytest.approx((gated.moved / 8e9, gated.moved / 1e9))
    assert by["conv.backward"]["peer"] is by["conv.backward"]["ratio"] is by["conv.backward.error"]["peer"] is None
    assert read_rows(file) == rows


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_saved_rows_take_the_place_of_the_same_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    first, second = (norm.plain_case(rows=5, d=d, backward=False) for d in (12, 16))
    kernels.time_cases([first, second], None, ROOFS, CPU, file)
    before = read_rows(file)
    before[2] |= {"value": 99.0, "shape": f"{first.shape} clock=events"}
    file.write_text(json.dumps(before))
    kernels.time_cases([first], None, ROOFS, CPU, file)
    after = read_rows(file)
    assert [r["what"] for r in after] == [r["what"] for r in before]
    assert after[2]["value"] != 99.0
    assert after[4:] == before[4:]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"what": 1}]', '[{"what": "a", "shape": 1}]'])
def test_a_file_that_holds_no_rows_is_not_written_over(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        read_rows(file)


def test_a_save_that_cannot_be_used_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as result rows"):
        kernels.bench_kernels(save=tmp_path)


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_a_gpu_that_cannot_go_on_costs_no_case_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = iter([None, RuntimeError("illegal address")])

    def clear() -> None:
        if fault := next(cleared):
            raise fault

    monkeypatch.setattr(torch.cuda, "empty_cache", clear)
    cases = [norm.plain_case(rows=5, d=d, backward=False) for d in (12, 16)]
    rows, red = kernels.time_cases(cases, None, ROOFS, CPU)
    assert [r["what"] for r in rows[2:]] == ["norm.forward", "norm.forward.error"]
    assert red == [f"{cases[1].name}: RuntimeError illegal address"]


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_beside_a_peer_that_is_wrong_ours_is_timed_alone(
    factor: float, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    class Wrong(Twin):
        def ssd(self, *given, **named):
            y, state = super().ssd(*given, **named)
            return y, state * factor

    rows, red = kernels.time_cases([ssd.prefill_case(SIZES, 4)], Wrong(), ROOFS, CPU, tmp_path / "rows.json")
    assert not red
    assert [r["what"] for r in rows[2:]] == ["ssd.prefill", "ssd.prefill.error"]
    assert all(r["peer"] is r["peer_value"] is r["ratio"] is None for r in rows[2:])
    assert "twin 1 differs from the plain form" in caplog.text


def test_the_roof_of_memory_is_that_of_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = [torch.full((4,), float(i)) for i in range(gpu_clock.BUFFERS)]
    ways = gpu_clock._memory_ways(buffers)
    for way, result in (("copy", 2.0), ("neg", -2.0), ("add", 2.0 + 5.0)):
        ways[way][1][2]()
        assert buffers[8].eq(result).all()
    ways["neg_in_place"][1][2]()
    assert buffers[2].eq(-2.0).all()
    assert ways["sum"][1][2]() == -8.0

    def timed(sides: list[list[Callable]]) -> list[Timing]:
        assert [len(side) for side in sides] == [1, 6, 6, 9, 3, 9]
        return [Timing(seconds, seconds, seconds, "graph") for seconds in (1.0, 3.0, 2.0, 4.0, 2.5, 5.0)]

    monkeypatch.setattr(gpu_clock, "time_in_turn", timed)
    roofs = gpu_clock.measure_roofs(CPU, buffer=1 << 10, width=8)
    assert (roofs.way, roofs.bytes_per_s, roofs.memory.median) == ("add", pytest.approx(3 * 1024 / 2.5), 2.5)
    assert roofs.flops_per_s == 2 * 8 ** 3


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_replayed_sets_stand_at_different_tokens_when_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, torch.Tensor]] = []
    draw_sets = kernels.draw_sets
    monkeypatch.setattr(kernels, "draw_sets", lambda *given: drawn.extend(draw_sets(*given)) or drawn)
    _, red = kernels.time_cases([decode.replay_case(STEP, "fp32")], Twin(), ROOFS, CPU)
    assert not red
    assert sorted(int(inputs["cursor"][0, 1]) for inputs in drawn) == list(range(1, decode.REPLAYED + 1))


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_rows_with_the_roof_of_a_copy_are_still_shown() -> None:
    rows, _ = kernels.time_cases([norm.plain_case(rows=5, d=12, backward=False)], None, ROOFS, CPU)
    rows[0] |= {"what": "roof.copy", "shape": "bytes=2GiB"}
    text = render_table(rows)
    assert "\nCopy: 3 TB/s (bytes=2GiB).\n" in text
    assert not any(line.startswith("| roof") for line in text.splitlines())


@pytest.mark.usefixtures("plain_kernels", "fake_clock")
def test_the_table_shows_what_the_rows_hold() -> None:
    lacking = dataclasses.replace(ssd.mixer_case(SIZES, 4, backward=False), peer_lacks="its convolution")
    cases = [ssd.ssd_case(SIZES, 4, backward=False), lacking, conv.conv_case(b=2, t=9, ch=12, backward=False)]
    rows, _ = kernels.time_cases(cases, Twin(), ROOFS, CPU)
    rows[6]["shape"] = rows[6]["shape"].replace("graph", "events")
    text = render_table(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["what", "shape", "hinny", "low … high", "unit", "of bound", "peer", "ratio", "error",
                        "peer's error"]
    assert lines[2][:5] == ["ssd.forward", "b=2 t=9 h=4 p=8 g=2 n=8 peer_chunk=4", "2", "1 … 8", "ms"]
    assert lines[2][6:8] == ["3", "1.50x"]
    assert lines[3][6] == "3*"
    assert lines[3][9] == lines[4][6] == lines[4][7] == ""
    assert lines[4][5] == f"{rows[6]['value'] / 3:.0%}"
    assert "twin 1 without its convolution" in text
    assert "conv.forward b=2 t=9 ch=12 w=4: timed with events" in text
    assert all(f"commit {r['commit']}" in text and r["command"] in text for r in rows)


def test_only_picks_cases_by_name_or_by_shape() -> None:
    assert {case.what for case in kernels._chosen(["ssd.*"])} == {"ssd.forward", "ssd.backward", "ssd.prefill"}
    assert {case.what for case in kernels._chosen(["conv.forward", "*t=32768 h=*"])} == {
        "conv.forward", "ssd.forward", "ssd.backward"}
    assert [case.name for case in kernels._chosen([])] == [case.name for case in kernels._chosen(["*"])]
    with pytest.raises(ConfigError, match=r"'ssd' fits no case(.|\n)*gated_norm\.forward rows="):
        kernels._chosen(["conv.*", "ssd"])


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="needs a GPU that PyTorch sees"):
        bench("kernels")


def test_sides_are_timed_in_turn_and_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    works = {"ours": lambda: order.append("ours"), "theirs": lambda: order.append("theirs")}
    speeds = iter(range(1, 10_000))

    def sample(work: Callable, repeats: int) -> float:
        work()
        return 0.1 + next(speeds) * 1e-6 if work is works["ours"] else 0.2

    monkeypatch.setattr(gpu_clock, "_works", lambda sides: (list(works.values()), "events"))
    monkeypatch.setattr(gpu_clock, "_sample", sample)
    ours, theirs = gpu_clock.time_in_turn([[print] * 4, [print] * 2])
    assert order[6:] == ["ours", "theirs"] * gpu_clock.SAMPLES[0]
    assert ours.clock == "events"
    assert ours.low < ours.median < ours.high
    assert (ours.median, theirs.median) == pytest.approx((0.1 / 4, 0.2 / 2), rel=1e-3)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source folder of a package like mamba_ssm, whose own __init__ cannot be imported."""
    modules = {
        "__init__": '__version__ = "9.8.7"\nimport selective_scan_cuda\n',
        "ops/__init__": "", "ops/triton/__init__": "",
        "ops/triton/ssd_combined": "def mamba_chunk_scan_combined(*given, **named): return given, named\n",
        "ops/triton/layernorm_gated": "def rmsnorm_fn(*given, **named): return given, named\n",
        "ops/triton/selective_state_update": "def selective_state_update(*given, **named): return given, named\n"}
    for name, text in modules.items():
        file = tmp_path / "mamba_ssm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


@pytest.fixture
def free_to_tune() -> None:
    """The tests' deterministic mode off: the peer refuses it."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("free_to_tune")
def test_the_peer_is_reached_round_its_package_and_given_its_own_arguments(source: Path) -> None:
    peer = kernel_peers.find_peer("mamba_ssm")
    assert kernel_peers.find_peer("mamba_ssm").name == peer.name == "mamba_ssm 9.8.7"
    x: dict[str, Any] = ssd.ssd_case(SIZES, 4, backward=False).inputs(Draw(CPU, 0))
    given, named = peer.ssd(**x, chunk_len=4, final=True)
    assert [v is x[name] for name, v in zip(("x", "dt", "A", "B", "C"), given[:5], strict=True)] == [True] * 5
    assert given[5] == 4
    assert named["dt_softplus"] is named["return_final_states"] is True
    assert named["D"] is x["D"]
    assert peer.gated_rms_norm(1, 2, 3, 4, 5) == (  # type: ignore[arg-type]
        (1, 3, None), {"z": 2, "eps": 4, "group_size": 5, "norm_before_gate": False})
    state = torch.zeros(2, 4, 8, 8)
    given, named = peer.ssd_update(state, x["x"][:, 0], x["dt"][:, 0], x["A"], x["B"][:, 0], x["C"][:, 0], x["D"],
                                   x["dt_bias"])
    assert given[0] is state
    # broadcast over head_dim and state without memory: its mark of one decay a head
    assert [tuple(v.shape) for v in (given[2], given[3], named["D"], named["dt_bias"])] == [
        (2, 4, 8), (4, 8, 8), (4, 8), (4, 8)]
    assert given[3].stride()[1:] == (0, 0)
    assert given[2].stride(-1) == named["dt_bias"].stride(-1) == 0


@pytest.mark.usefixtures("free_to_tune")
def test_a_peer_that_cannot_be_had_is_refused_with_what_to_do(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="--against fla: unknown peer; known for kernels: mamba_ssm"):
        kernel_peers.find_peer("fla")
    (source / "mamba_ssm/ops/triton/ssd_combined.py").write_text("import no_such_module\n")
    with pytest.raises(BackendError, match=r"ssd_combined.*no_such_module"):
        kernel_peers.find_peer("mamba_ssm")
    del sys.modules["mamba_ssm"]  # for good: undone, it would be back behind the fixture, for transformers to find
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"not on PYTHONPATH.*pip download"):
        kernel_peers.find_peer("mamba_ssm")
    torch.use_deterministic_algorithms(True)
    with pytest.raises(BackendError, match="deterministic mode"):
        kernel_peers.find_peer("mamba_ssm")
