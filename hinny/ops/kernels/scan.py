"""Selective scan on kernels: the launches behind `hinny.ops.selective_scan` and its step, as PyTorch operators.

    forward     prepare, walk; where sequences and channels are too few to fill the GPU, spans of the sequence are
                walked at once: from zero, then `combine`, then again from what truly enters them
    backward    walk (again, from the states that the forward kept of each span: states at chunk edges, dz), walk
                back (their gradients at chunk edges), gradients, sums over programs

On a Hopper GPU, `scan_fast` takes bfloat16 with 33 to 128 states and enough channels to fill it (`scan_fast.takes`).
Edges take n/2 bytes a token and channel, so the backward takes pieces of the batch, or of one long sequence, in turn.
States are (b n d) in memory, and (b d n) for callers: the kernels' lanes are channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hinny.ops.inputs import document_starts
from hinny.ops.kernels import scan_fast
from hinny.ops.kernels.batches import by_batches
from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.launches import FALLBACK, launch, rules
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.scan_backward import backward
from hinny.ops.kernels.scan_call import COMBINED, PREPARED, Call, contiguous, in_float32
from hinny.ops.kernels.scan_gradients import scan_gradients
from hinny.ops.kernels.scan_walks import scan_combine, scan_prepare, scan_step, scan_walk, scan_walk_back

LARGEST_BATCH = 65535
"""Sequences of one call: as many programs as a launch has along its third axis."""


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`hinny.ops.selective_scan` on kernels: the same arguments, already checked, and results.

    The final state is a view of (b n d) memory.
    """
    if len(x) > LARGEST_BATCH:
        return by_batches(selective_scan, LARGEST_BATCH, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias,
                          dt_softplus=dt_softplus, initial_state=initial_state, segments=segments)
    if x.shape[1] == 1 and not _wants_gradients(x, dt, A, B, C, D, z, dt_bias, initial_state):
        y, state = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D, z=None if z is None else z[:, 0],
                                       dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=initial_state)
        return y.unsqueeze(1), state
    initial = None if initial_state is None else initial_state.transpose(1, 2)
    first_tokens = None if segments is None else document_starts(segments)
    y, final, _ = _operator(x, dt, A, B, C, D, z, dt_bias, initial, first_tokens, dt_softplus)
    return y, final.transpose(1, 2)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`hinny.ops.selective_scan_step` on kernels: the same arguments, already checked, and results."""
    if _wants_gradients(x, dt, A, B, C, D, z, dt_bias, initial_state):
        y, state = selective_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D=D,
                                  z=None if z is None else z[:, None], dt_bias=dt_bias, dt_softplus=dt_softplus,
                                  initial_state=initial_state)
        return y[:, 0], state
    initial = None if initial_state is None else initial_state.transpose(1, 2)
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    y, state = (_step_operator if traced else _step)(x, dt, A, B, C, D, z, dt_bias, initial, dt_softplus)
    return y, state.transpose(1, 2)


def _wants_gradients(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, first_tokens: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t d), the final state (b n d), and the states that enter each span (b s n d); of `scan_fast` (s b n d)."""
    if scan_fast.takes(x, dt, B, C, z):
        return scan_fast.forward(x, dt, A, B, C, D, z, dt_bias, initial, first_tokens, softplus)
    call = Call.of(x, B.shape[2])
    x, dt, z, D, dt_bias = contiguous(x, dt, z, D, dt_bias)
    initial = in_float32(initial)
    rates, B, C = call.prepare(A, B, C)
    y, final, entering = _outputs(call, x)
    if not call.split:
        call.walk(scan_walk, call.b, 1, softplus, x.device, x, dt, z, rates, B, C, D, dt_bias, first_tokens, initial,
                  None, y, entering, final, None, call.t, call.d, call.padded, call.padded, call.span)
        return y, final, entering
    totals = rates.new_empty(call.b, call.spans, call.d)
    sizes = (call.t, call.d, call.padded, call.span, call.span)
    call.walk(scan_walk, call.b, call.spans, softplus, x.device, x, dt, None, rates, B, C, None, dt_bias, first_tokens,
              None, None, None, None, entering, totals, *sizes)
    call.combine(entering, totals, rates, initial, backward=False)
    call.walk(scan_walk, call.b, call.spans, softplus, x.device, x, dt, z, rates, B, C, D, dt_bias, first_tokens,
              entering, None, y, None, final, None, *sizes)
    return y, final, entering


def _results(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, first_tokens: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if scan_fast.takes(x, dt, B, C, z):
        return scan_fast.outputs(x, A.shape[1])
    return _outputs(Call.of(x, A.shape[1]), x)


def _outputs(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, d = call.b, call.n, call.d
    return (torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, n, d, dtype=torch.float32),
            x.new_empty(b, call.spans, n, d, dtype=torch.float32))


def _fake_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial: Tensor | None, first_tokens: Tensor | None, entering: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, _, d), n = x.shape, A.shape[1]
    dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    return (dx, ddt, entering.new_empty(d, n + 1), dB, dC, dz, entering.new_empty(d),
            entering.new_empty((b, n, d) if initial is not None else 0))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(
    run: Any, ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, _, A, _, _, D, z, dt_bias, initial, *_ = saved = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, weights, dB, dC, dz, dbias, dinitial = run(dy, dfinal, *saved, ctx.softplus)
    return (dx, ddt, weights[:, 1:].to(A.dtype), dB, dC, None if D is None else weights[:, 0].to(D.dtype),
            None if z is None else dz, None if dt_bias is None else dbias.to(dt_bias.dtype),
            None if initial is None else dinitial.to(initial.dtype), None, None)


_operator = differentiable("selective_scan", _forward, backward, fake=_results, fake_backward=_fake_backward,
                           save=_save, gradients=_gradients)


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (b d) and the next state (b n d) of one token."""
    (b, d), n = x.shape, A.shape[1]
    x, dt, A, B, C, D, z, dt_bias = contiguous(x, dt, A, B, C, D, z, dt_bias)
    y, state = _step_results(x, dt, A, B, C, D, z, dt_bias, initial, softplus)
    # a state of the kernels' own has its channels together, one of a caller's its n numbers: either is read as it is
    channels_last = initial is None or not initial.transpose(1, 2).is_contiguous()
    initial = in_float32(initial) if initial is None or channels_last else in_float32(initial.transpose(1, 2))
    use = launch("scan_step", x.device, n=n)
    rows = use.pop("BB")
    with torch.cuda.device_of(x):
        scan_step[triton.cdiv(d, use["BD"]), triton.cdiv(b, rows)](
            x, dt, A, B, C, D, z, dt_bias, initial, y, state, b, d, n=n, N=triton.next_power_of_2(n), BB=rows,
            SOFTPLUS=softplus, CHANNELS_LAST=channels_last, **use)
    return y, state


def _step_results(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:
    (b, d), n = x.shape, A.shape[1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, n, d, dtype=torch.float32)


_step_operator = torch.library.custom_op("hinny::selective_scan_step", _step, mutates_args=())
_step_operator.register_fake(_step_results)


FLOATS = ("rates", "wide", "starts", "edges", "dedges", "ends", "totals", "initial", "parts", "channel_parts", "state",
          "new_state", "A", "D", "dt_bias")
NUMBERS = ("t", "d", "padded", "span", "spacing", "spans", "rows", "chunks_each", "group")
TYPES = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(NUMBERS, "i32") | {"first_tokens": "*i1"}
MAY_SPILL = {"scan_gradients-0-documents": "a few addresses of a chunk's tokens, outside the loop over states"}
ABSENT: dict[str, dict[str, tuple[str, ...]]] = {
    "scan_walk": {"forward": ("dy", "totals"), "edges": ("D", "ends", "totals"),
                  "local": ("z", "D", "starts", "dy", "y", "edges")},
    "scan_walk_back": {"edges": ("totals",), "local": ("starts", "edges")},
    "scan_gradients": {"all": ("first_tokens",), "documents": ()},
    "scan_step": {"all": ()},
}
"""Kernel → what launches of it leave out."""


def compilations(table: str) -> list[Compilation]:
    """Every kernel with every configuration of a shipped table, for bf16 inputs, with all that a layer gives.

    Launches other than a kernel's first are compiled for the least n of the table, and for one generation.
    """
    found = [_compilation(scan_prepare, "all", (), {"n": 16, "N": 16} | PREPARED),
             _compilation(scan_combine, "all", (), {"n": 16, "BACKWARD": False} | COMBINED)]
    kernel: Any
    for kernel in (scan_walk, scan_walk_back, scan_gradients, scan_step):
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            n = rule["when"].get("n", [1, 128])[1] if kernel in (scan_walk, scan_walk_back) else 16
            constants = {"n": n, "N": triton.next_power_of_2(n), "W": rule["use"]["num_warps"], "SOFTPLUS": True,
                         "CHANNELS_LAST": True} | rule["use"]
            cases = list(ABSENT[kernel.fn.__name__].items())
            found += [_compilation(kernel, f"{number}-{case}", absent, constants)
                      for case, absent in (cases if number == 0 and table != FALLBACK else cases[:1])]
    return found


def _compilation(kernel: Any, case: str, absent: tuple[str, ...], constants: dict[str, Any]) -> Compilation:
    signature: dict[str, str] = {}
    given: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            given[name] = constants[name]
        elif name in absent:
            given[name] = None
        elif name in ("B", "C") and kernel not in (scan_prepare, scan_step):
            signature[name] = "*fp32"
        else:
            signature[name] = TYPES.get(name, "*bf16")
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    name = f"{kernel.fn.__name__}-{case}"
    return Compilation(name, kernel, signature, given, constants["num_warps"], constants.get("num_stages", 1), aligned,
                       may_spill=MAY_SPILL.get(name, ""))


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    return {
        "scan_walk": [{"U": U, "num_warps": warps, "num_stages": 1, "PROGRAMS": 2112 // warps, "ENOUGH": 300 // warps,
                       "SHORTEST": 64} for U, warps in ((4, 1), (8, 1), (4, 2), (8, 2), (4, 4), (8, 4), (4, 8))],
        "scan_walk_back": [{"U": U, "num_warps": warps, "num_stages": 1}
                           for U, warps in ((4, 1), (8, 1), (8, 2), (8, 4), (4, 8))],
        "scan_gradients": [{"CHUNKS": chunks, "PROGRAMS": programs, "EDGE_BYTES": 2 ** 30, "num_warps": 1,
                            "num_stages": 1}
                           for chunks in (4, 16) for programs in (2112, 4224, 8448)],
        "scan_step": [{"BD": BD, "BB": BB, "num_warps": warps, "num_stages": 1}
                      for BD, BB, warps in ((32, 1, 1), (64, 1, 4), (64, 4, 4), (128, 4, 4), (128, 8, 8))],
    }
