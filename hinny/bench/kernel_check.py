"""Whether a kernel may be timed: its results beside PyTorch's in float32, and beside themselves, bit for bit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hinny.bench.kernel_cases.case import Case, Draw, Inputs, Outputs
from hinny.bench.kernel_peers import MambaSSM
from hinny.errors import BackendError
from hinny.ops import use_backend

logger = logging.getLogger(__name__)


def check(case: Case, peer: MambaSSM | None, device: torch.device) -> tuple[float, float | None]:
    """The largest relative error ||a - b|| / ||b|| of the kernels' results, and of the peer's where it does the same.

    b is the plain PyTorch form in float32 of the same inputs. Raises BackendError if an error is too large, or if the
    same call twice gives other bits; the peer's error may be anything, NaN too.
    """
    inputs = case.inputs(Draw(device, 0))
    start = time.perf_counter()
    with use_backend("triton"):
        results = results_of(case, case.ours, inputs)
    _finish(device)
    logger.info("  first call after %.1f s, compiling what is in no cache", time.perf_counter() - start)
    wide = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
    with use_backend("torch"):
        expected = results_of(case, case.ours, wide)
    del wide
    errors = _errors(results, expected)
    for name, error in errors.items():
        if not error <= case.tolerance:
            raise BackendError(f"{case.name}: {name} differs from the plain form by {error:.1e}, more than "
                               f"{case.tolerance:.1e}: nothing was timed.")
    with use_backend("triton"):
        again = results_of(case, case.ours, inputs)
    for name, value in results.items():
        if not torch.equal(value, again[name]):
            raise BackendError(f"{case.name}: {name} has other bits when it is computed again: nothing was timed.")
    del again
    if peer is None or case.peer_lacks:
        return max(errors.values()), None
    theirs = _errors(results_of(case, case.of_peer(peer), inputs), expected)
    return max(errors.values()), _largest(theirs.values())


def _largest(errors: Iterable[float]) -> float:
    """The largest, NaN if there is one."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(value, expected[name]) for name, value in results.items()}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||, or ||value|| where nothing is expected."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    # in float64, a piece at a time: a copy of everything would take gigabytes
    pairs = zip(value.flatten().split(2 ** 24), expected.flatten().split(2 ** 24), strict=True)
    parts = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs]
    difference, whole = (float(sum(part)) for part in zip(*parts, strict=True))
    return math.sqrt(difference / whole) if whole else math.sqrt(difference)


def results_of(case: Case, call: Callable[..., Outputs], inputs: Inputs) -> dict[str, Tensor]:
    """The outputs and what is updated in place, or the gradients, by name; `inputs` stay as they are."""
    own = {name: v.clone() for name, v in inputs.items()}
    if case.wanted:
        found = work_of(case, call, own)()
        return {f"the gradient of {name}": v for name, v in zip(case.wanted, as_tuple(found), strict=True)}
    outputs = as_tuple(work_of(case, call, own)())
    return {f"output {i}": v for i, v in enumerate(outputs)} | {f"the new {name}": own[name] for name in case.updated}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """The outputs of a call that may return one or several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def work_of(
    case: Case, call: Callable[..., Outputs], inputs: Inputs, *, lacking: bool = False,
) -> Callable[[], Outputs]:
    """What is timed of a call: its forward, its backward, or both, on one set of inputs, as often as wanted.

    lacking: the call does not use all the inputs that gradients are wanted of.
    """
    if not case.wanted:
        def forward() -> Outputs:
            with torch.no_grad():
                return call(**inputs)

        return forward
    leaves = [inputs[name].requires_grad_() for name in case.wanted]

    def gradients(output: Tensor, retain: bool) -> Outputs:
        return torch.autograd.grad(output, leaves, given, retain_graph=retain, allow_unused=lacking)

    output = as_tuple(call(**inputs))[0]
    # drawn in one dtype, so that it is the same gradient for outputs of any
    given = Draw(output.device, 1).normal(*output.shape).to(output.dtype)
    if not case.whole:
        return lambda: gradients(output, retain=True)
    return lambda: gradients(as_tuple(call(**inputs))[0], retain=False)
