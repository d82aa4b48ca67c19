"""SSD on kernels: the launches behind `hinny.ops.ssd`. The plan, who reads and writes what: docs/ssd.md, "The kernels".

Chunk lengths come from the launch table, each direction's by itself; the op's chunk_len has no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hinny.ops.inputs import count_documents
from hinny.ops.kernels import hopper, ssd_backward, ssd_forward
from hinny.ops.kernels.batches import by_batches
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.ssd_call import HEADS_A_PROGRAM, Call, tile

LARGEST_BATCH = 32767
"""Sequences of one call: a launch has at most 65535 programs along its third axis, two a sequence in the backward."""


def too_large(x: Tensor, B: Tensor, C: Tensor) -> str:
    """Why the kernels cannot take heads and states of these sizes; empty if they can."""
    p, n, dtype = x.shape[3], B.shape[3], _product_type(x, B, C)
    limit = 128 * (128 if dtype is torch.float32 else 256)
    if p <= 128 and n <= 256 and tile(p) * tile(n) <= limit:
        return ""
    return f"head_dim {p} with state {n} needs more shared memory than SSD's kernels have for {dtype}"


def _product_type(x: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """The type of the products' operands: the widest given, float32 at most."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    return torch.float32 if dtype is torch.float64 else dtype


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`hinny.ops.ssd` on kernels: the same arguments, already checked, and results."""
    if len(x) > LARGEST_BATCH:
        return by_batches(ssd, LARGEST_BATCH, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                          initial_state=initial_state, segments=segments)
    dtype = _product_type(x, B, C)
    documents = None if segments is None else count_documents(segments).to(torch.int32)
    values, keys, queries = x.to(dtype), B.to(dtype), C.to(dtype)
    z = None if z is None else z.to(dtype)
    more_p, more_n = _padding(x, x.shape[3]), _padding(x, B.shape[3])
    if not more_p and not more_n:
        y, final, _ = _operator(values, dt, A, keys, queries, D, z, dt_bias, initial_state, documents, dt_softplus)
        return y.to(x.dtype), final
    values, z = (None if v is None else F.pad(v, (0, more_p)) for v in (values, z))
    keys, queries = (F.pad(v, (0, more_n)) for v in (keys, queries))
    initial = None if initial_state is None else F.pad(initial_state, (0, more_n, 0, more_p))
    y, final, _ = _operator(values, dt, A, keys, queries, D, z, dt_bias, initial, documents, dt_softplus)
    return y[..., :x.shape[3]].to(x.dtype), final[..., :x.shape[3], :B.shape[3]]


def _padding(x: Tensor, size: int) -> int:
    """Columns of zeros for heads or states of `size`: on a GPU, tiles narrower than 64 fail (docs/log.md)."""
    return max(64, triton.next_power_of_2(size)) - size if x.is_cuda else -size % (16 // x.element_size())


def rows_of_steps(dt: Tensor) -> Tensor:
    """dt (b t h) with heads next to each other and batch rows back to back; a slice of a wider row stays one."""
    return dt if dt.stride(2) == 1 and dt.stride(0) == dt.shape[1] * dt.stride(1) else dt.contiguous()


def _decays(
    call: Call, x: Tensor, B: Tensor, dt: Tensor, dt_bias: Tensor | None, A: Tensor, softplus: bool,
    documents: Tensor | None, flags: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Steps and sums of decays, and the documents (b c*q) that the kernels still have to keep apart."""
    documents = call.padded(documents)
    if _by_gaps(x, B):
        return call.prepare(dt, dt_bias, A, softplus, documents, flags), None
    return call.prepare(dt, dt_bias, A, softplus, None), documents


def _by_gaps(x: Tensor, B: Tensor) -> bool:
    """Whether gaps in the decays keep documents apart, as the Hopper kernels need; they cost float32 a few digits."""
    return hopper.takes(x, B)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, documents: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t h p), final state (b h p n), and y before the gate (empty without z)."""
    x, B, C, dt = x.contiguous(), B.contiguous(), C.contiguous(), rows_of_steps(dt)
    A, D, z, dt_bias, initial = (None if v is None else v.contiguous() for v in (A, D, z, dt_bias, initial))
    on_hopper = hopper.takes(x, B) and z is None
    kernel = "hopper_forward" if on_hopper else "ssd_forward"
    call = Call(kernel, x, B)
    use, parts, part_chunks = call.walk(kernel, call.b * call.h)
    share = call.share(call.p // hopper.COLUMNS) if on_hopper and parts == 1 else 0
    flags = x.new_empty(call.b, call.h, dtype=torch.int64) if share else None
    decays, documents = _decays(call, x, B, dt, dt_bias, A, softplus, documents, flags)
    steps, sums = decays[0], decays[1]
    local, local_sums = None, None
    if parts > 1 and on_hopper:
        local, local_sums = hopper.walk_parts(call, x, B, None, None, decays, parts, part_chunks)
    elif parts > 1:
        local, local_sums = walk_parts(call, x, B, None, None, steps, sums, documents, parts, part_chunks)
    y, ungated = torch.empty_like(x), torch.empty_like(x if z is not None else x[:0])
    final = x.new_empty(call.b, call.h, call.p, call.n, dtype=torch.float32)
    if on_hopper:
        hopper.forward(call, x, B, C, decays, D, initial, local, local_sums, flags, y, final, parts,
                       share or part_chunks, use)
        return y, final, ungated
    ssd_forward.ssd_forward[(call.h, parts, call.b)](
        x, B, C, steps, sums, D, z, initial, documents, local, local_sums, y, ungated, final, call.t, call.chunks,
        parts, part_chunks, BP=tile(call.p), **call.tiles, **use)
    return y, final, ungated


def walk_parts(
    call: Call, x: Tensor, B: Tensor, dy: Tensor | None, C: Tensor | None, steps: Tensor, sums: Tensor,
    documents: Tensor | None, parts: int, part_chunks: int,
) -> tuple[Tensor, Tensor]:
    """What each part that others follow adds to the state by itself, and its sum of log2 decays; with dy and C also
    backwards, to its gradient: (direction b h part p n), (direction b h part)."""
    directions = 1 if dy is None else 2
    use, _, _ = call.walk("ssd_boundaries", 1)
    block = min(use.pop("BP"), tile(call.p))
    local = x.new_empty(directions, call.b, call.h, parts, call.p, call.n, dtype=torch.float32)
    local_sums = x.new_empty(directions, call.b, call.h, parts, dtype=torch.float32)
    ssd_forward.ssd_boundaries[(call.h * triton.cdiv(call.p, block), parts - 1, directions * call.b)](
        x, B, dy, C, steps, sums, documents, None, None, None, None, local, local_sums, None, call.t, call.chunks,
        parts, part_chunks, BP=block, LOCAL=True, **call.tiles, **use)
    return local, local_sums


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, documents: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, h, p = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(b, h, p, B.shape[3], dtype=torch.float32)
    return y, final, torch.empty_like(y if z is not None else y[:0])


def backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, documents: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty where that was not given."""
    x, B, C, dt, dy = x.contiguous(), B.contiguous(), C.contiguous(), rows_of_steps(dt), dy.contiguous()
    A, D, dt_bias, dfinal, initial = (None if v is None else v.contiguous() for v in (A, D, dt_bias, dfinal, initial))
    call = Call("ssd_gram", x, B)
    decays, documents = _decays(call, x, B, dt, dt_bias, A, softplus, documents)
    steps, sums = decays[0], decays[1]
    states = x.new_empty(2, call.b, call.chunks, call.h, call.p, call.n)
    edges, dedges = states[0], states[1]
    dinitial = x.new_empty(call.b, call.h, call.p, call.n, dtype=torch.float32)
    if hopper.takes(x, B):
        hopper.boundaries(call, x, B, dy, C, decays, initial, dfinal, dinitial, states)
    else:
        _boundaries(call, x, B, dy, C, steps, sums, documents, initial, dfinal, edges, dedges, dinitial)
    if hopper.takes(x, B) and call.p == hopper.COLUMNS:
        dx, dB, dC, passing, vectors = hopper.gradients(call, x, B, dy, C, D, decays, edges, dedges)
    else:
        dx, dB, dC, passing, vectors = _within(call, x, B, dy, C, D, steps, sums, documents, edges, dedges)
    direct, enclosed, crossed, entering, leaving, skipped = vectors
    chunks = passing.shape[1]
    scalars = steps.new_empty(3, call.b, chunks, call.h)
    dA, dbias, dD = scalars.unbind()
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    ssd_backward.ssd_finish[(call.b * chunks, triton.cdiv(call.h, HEADS_A_PROGRAM))](
        dt, dt_bias, A, steps, direct, enclosed, crossed, entering, leaving, passing, skipped, ddt, dA,
        None if dt_bias is None else dbias, None if D is None else dD, call.t, chunks, dt.stride(1),
        H=call.h, Q=call.Q * call.chunks // chunks, BH=HEADS_A_PROGRAM, SOFTPLUS=softplus, num_warps=4)
    dA, dbias, dD = scalars.sum((1, 2)).unbind()
    return (dx, ddt, dA.to(A.dtype, copy=True), dB, dC, _or_empty(D, dD, dy), _or_empty(dt_bias, dbias, dy),
            _or_empty(initial, dinitial, dy))


def _boundaries(
    call: Call, x: Tensor, B: Tensor, dy: Tensor, C: Tensor, steps: Tensor, sums: Tensor, documents: Tensor | None,
    initial: Tensor | None, dfinal: Tensor | None, edges: Tensor, dedges: Tensor, dinitial: Tensor,
) -> None:
    """Fills edges, the states entering the chunks, dedges, the gradients of those leaving them, and dinitial."""
    block = min(call.launch("ssd_boundaries")["BP"], tile(call.p))
    blocks = triton.cdiv(call.p, block)
    use, parts, part_chunks = call.walk("ssd_boundaries", 2 * call.b * call.h * blocks)
    del use["BP"]
    local, local_sums = None, None
    if parts > 1:
        local, local_sums = walk_parts(call, x, B, dy, C, steps, sums, documents, parts, part_chunks)
    ssd_forward.ssd_boundaries[(call.h * blocks, parts, 2 * call.b)](
        x, B, dy, C, steps, sums, documents, initial, dfinal, edges, dedges, local, local_sums, dinitial, call.t,
        call.chunks, parts, part_chunks, BP=block, LOCAL=False, **call.tiles, **use)


def _within(
    call: Call, x: Tensor, B: Tensor, dy: Tensor, C: Tensor, D: Tensor | None, steps: Tensor, sums: Tensor,
    documents: Tensor | None, edges: Tensor, dedges: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """dx, dB, dC, passing (b c h), and the vectors that `ssd_finish` takes."""
    use = call.launch("ssd_gram")
    split = call.split(use.pop("PROGRAMS"))
    tiles = dict(H=call.h, G=call.g, BP=tile(call.p), BN=tile(call.n), Q=use.pop("Q"), SPLIT=split,
                 PRECISION=call.precision)
    grid = (call.chunks, call.g * split, call.b)
    passing = steps.new_empty(call.b, call.chunks, call.h)
    vectors = steps.new_empty(6, *steps.shape).unbind()
    direct, enclosed, crossed, entering, leaving, skipped = vectors
    pairs = x.new_empty(call.b, call.chunks, call.g, split, call.Q, call.Q)
    ssd_backward.ssd_gram[(3 * call.chunks, *grid[1:])](
        *(_rows_of(v, call.Q // 2) for v in (x, dy, B, C)), steps, sums, documents, pairs, enclosed, crossed,
        call.chunks, **tiles, **use)
    dx = torch.empty_like(x)
    x_tiles, dy_tiles, B_tiles, C_tiles, dx_tiles = (_rows_of(v, call.Q) for v in (x, dy, B, C, dx))
    edge_tiles, dedge_tiles = (_states_of(v) for v in (edges, dedges))
    ssd_backward.ssd_inputs[grid](x_tiles, dy_tiles, B_tiles, C_tiles, dedge_tiles, steps, sums, D, documents, dx_tiles,
                                  direct, leaving, skipped, call.chunks, **tiles, **call.launch("ssd_inputs"))
    # two tensors, not two halves of one: results of an operator may not share memory
    dB, dC = (B.new_empty(split * call.b, *B.shape[1:], dtype=B.dtype if split == 1 else torch.float32) for _ in "BC")
    ssd_backward.ssd_queries[grid](dy_tiles, B_tiles, C_tiles, edge_tiles, dedge_tiles, steps, sums, documents, pairs,
                                   _rows_of(dC, call.Q), entering, passing, call.chunks, **tiles,
                                   **call.launch("ssd_queries"))
    ssd_backward.ssd_keys[grid](x_tiles, C_tiles, dedge_tiles, steps, sums, documents, pairs, _rows_of(dB, call.Q),
                                call.chunks, **tiles, **call.launch("ssd_keys"))
    if split > 1:
        dB, dC = (v.view(split, *B.shape).sum(0).to(B.dtype) for v in (dB, dC))
    return dx, dB, dC, passing, vectors


def _rows_of(v: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head or group of v (b t heads k); zero outside."""
    return TensorDescriptor(v, v.shape, v.stride(), [1, rows, 1, tile(v.shape[3])])


def _states_of(v: Tensor) -> TensorDescriptor:
    """Tiles of one state of v (b c h p n)."""
    p, n = v.shape[-2:]
    return TensorDescriptor(v, [v.numel() // (p * n), p, n], [p * n, n, 1], [1, tile(p), tile(n)])


def _or_empty(given: Tensor | None, gradient: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(0) if given is None else gradient.to(given.dtype, copy=True)


def _fake_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, documents: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, A, B, C))
    dD, dbias, dinitial = (dy.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
                           for v in (D, dt_bias, initial))
    return dx, ddt, dA, dB, dC, dD, dbias, dinitial


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2] if tensors[6] is not None else None)
    ctx.mark_non_differentiable(output[2])


def _gradients(
    run: Any, ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial, documents, ungated = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dz = None
    if z is not None:
        dz = torch.ops.aten.silu_backward(dy * ungated, z)
        dy = dy * F.silu(z)
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = run(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, documents,
                                                   ctx.softplus)
    return (dx, ddt, dA, dB, dC, None if D is None else dD, dz, None if dt_bias is None else dbias,
            None if initial is None else dinitial, None, None)


_operator = differentiable("ssd", _forward, backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                           gradients=_gradients)
