"""The clock of `hinny bench kernels` on a GPU: graphs do what their calls do, also backwards, and events stand in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("pydantic", reason="hinny.bench reads recipes")

from hinny.bench.gpu_clock import capture, measure_roofs, time_in_turn
from hinny.bench.kernel_cases import norm
from hinny.bench.kernels import time_cases
from hinny.ops import causal_conv, use_backend

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    """Graphs are captured on a stream of their own; a clock is of no use in deterministic mode."""
    torch.use_deterministic_algorithms(False)
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_captured_backward_gives_the_gradients_of_the_call(backend: str) -> None:
    with use_backend(backend):
        x = torch.randn(2, 300, 64, device="cuda", requires_grad=True)
        weight = torch.randn(64, 4, device="cuda", requires_grad=True)
        y, _ = causal_conv(x, weight, activation="silu")
        given = torch.randn_like(y)
        found: list[tuple[torch.Tensor, ...]] = []

        def call() -> None:
            found.append(torch.autograd.grad(y, (x, weight), given, retain_graph=True))

        call()
        graph = capture([call, call])
    assert graph is not None
    for gradients in found[1:]:
        for gradient in gradients:
            gradient.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


def test_what_waits_for_the_gpu_is_timed_with_events_on_all_sides() -> None:
    x = torch.randn(1 << 20, device="cuda")
    timings = time_in_turn([[lambda: x.sum()], [lambda: x.sum().item()]])
    assert [timing.clock for timing in timings] == ["events", "events"]
    assert all(0 < timing.low <= timing.median <= timing.high for timing in timings)
    # the clock works on after a capture that failed
    (again,) = time_in_turn([[lambda: x.sum()]])
    assert again.clock == "graph"


def test_a_case_is_checked_and_timed_below_the_roof() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    roofs = measure_roofs(device, width=2048)
    case = norm.plain_case(rows=4096, d=4096, backward=True)
    rows, red = time_cases([case], None, roofs, device)
    assert not red
    timed = next(r for r in rows if r["what"] == case.what)
    assert "clock=graph" in timed["shape"]
    # the roof is that of the fastest plain way, so a call may pass it by the clock's noise and no more
    assert 0.05 * roofs.bytes_per_s < timed["value"] * 1e12 < 1.05 * roofs.bytes_per_s
