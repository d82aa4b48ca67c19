"""Products of few rows with large matrices, as decoding has them: the matrix is read once, and that is all the cost.

    row_kernel    one row: a program has TALL rows of the matrix and sums in registers, on the plain cores
    rows_kernel   2 to 64 rows: tiles (TALL WIDE) of the matrix stream through shared memory, STAGES of them on their
                  way, and meet the rows on the tensor cores, padded to 16 or a power of 2
    norm_kernel   the small things in between: residual, gate, norm, a program for a group of channels of a row
    rope_kernel   rotary positions, with the angles made where they are used

With EARLY a launch begins before the one in front of it has ended: what a matrix or a gain holds depends on no launch,
so a program asks for its first ones, and then waits for the rest of its inputs. So the memory has work between two
launches, of which a step of the 8B models has hundreds. Every kernel here that begins early waits before it ends: who
waits for it has then waited for all before it.
A matrix of int8 or 8-bit floats has a scale for each of its rows: the memory sends the short numbers, which are widened
in registers, and the sums are multiplied by the scales at the end.
Letters: m rows, n columns of the result, k of the inputs; d channels in groups of `size`.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hinny.ops.kernels.compile import TARGETS, Compilation
from hinny.ops.kernels.gates import sigmoid
from hinny.ops.kernels.launches import launch, overlaps, rules
from hinny.ops.kernels.operators import on_its_device

MOST_ROWS = 64
UNIT = 512
"""Inputs of a product come in multiples of so many; the tables' WIDE times SPLIT divide it."""
MOST_COUNTERS = 65536
"""Blocks of rows of a matrix whose inputs are shared out, at most."""
LARGEST_NORM = 16384
KNOW_FLOAT8 = ("sm90", "sm100")
"""Of `compile.TARGETS`."""


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """v float32: "" as it is, "gelu" by erf, "relu2"."""
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    if ACTIVATION == "relu2":
        v = tl.maximum(v, 0)
        v = v * v
    return v


@triton.jit
def ask(at):
    """Lets L2 fetch the lines of 128 bytes in which the addresses lie."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def widened(v, EARLY: tl.constexpr):
    """v → the same numbers in float32."""
    if EARLY and v.dtype == tl.int8:
        # a byte b is read as 2^23 + b + 128, four at a time: the conversion of integers has a quarter of other
        # instructions' rate, which is about the memory's
        return tl.inline_asm_elementwise("""{
            .reg .b32 bytes, a, b, c, d;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 a, bytes, 0x4B000000, 0x7650;
            prmt.b32 b, bytes, 0x4B000000, 0x7651;
            prmt.b32 c, bytes, 0x4B000000, 0x7652;
            prmt.b32 d, bytes, 0x4B000000, 0x7653;
            add.f32 $0, a, 0fCB000080;
            add.f32 $1, b, 0fCB000080;
            add.f32 $2, c, 0fCB000080;
            add.f32 $3, d, 0fCB000080;
            }""", "=f,=f,=f,=f,r", [v], dtype=tl.float32, is_pure=True, pack=4)
    return v.to(tl.float32)


@triton.jit
def widened_pairs(v, dtype: tl.constexpr, EARLY: tl.constexpr):
    """v int8 or float8, as the tensor cores have it, two numbers in a register of 16 bits → the same in dtype."""
    if EARLY and v.dtype == tl.int8 and dtype == tl.bfloat16:
        # a byte's last 7 bits are added to 128, and from that 128 or, by its first bit, 256 is taken: Triton's own way
        # puts four bytes in a register first, and takes a third more instructions for a tile
        return tl.inline_asm_elementwise("""{
            .reg .b32 b, low, high;
            cvt.u32.u16 b, $1;
            prmt.b32 b, b, 0x43434343, 0x4140;
            and.b32 low, b, 0xFF7FFF7F;
            lop3.b32 high, b, 0x00800080, 0xC300C300, 0xEA;
            add.rn.bf16x2 $0, low, high;
            }""", "=r,h", [v], dtype=tl.bfloat16, is_pure=True, pack=2)
    if v.dtype == tl.int8:
        return v.to(dtype)
    # by way of float32: straight has a quarter of the rate
    return v.to(tl.float32).to(dtype)


@triton.jit
def row_kernel(
    x, w, scale, y, n, k, ACTIVATION: tl.constexpr, EARLY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x (k,), w (n k), scale (n,) or None, y (n,); WIDE * STEPS columns are asked for at once."""
    if EARLY:
        gdc_launch_dependents()
    rows = tl.program_id(0) * TALL + tl.arange(0, TALL)
    columns = tl.arange(0, WIDE)
    at = w + rows.to(tl.int64)[:, None] * k + columns[None, :]
    inside = (rows < n)[:, None]
    if scale is not None:
        unit = tl.load(scale + rows, mask=rows < n, other=0)
    total = tl.zeros((TALL, WIDE), tl.float32)
    first = tl.load(at, mask=inside & (columns < k)[None, :], other=0.0, eviction_policy="evict_first")
    if EARLY:
        tl.debug_barrier()
        gdc_wait()
    value = tl.load(x + columns, mask=columns < k, other=0).to(tl.float32)
    total += widened(first, EARLY) * value[None, :]
    for start in tl.range(WIDE, k, WIDE, num_stages=STEPS):
        here = start + columns
        tile = tl.load(at + start, mask=inside & (here < k)[None, :], other=0.0, eviction_policy="evict_first")
        value = tl.load(x + here, mask=here < k, other=0).to(tl.float32)
        total += widened(tile, EARLY) * value[None, :]
    out = tl.sum(total, 1)
    if scale is not None:
        out *= unit
    out = activated(out, ACTIVATION)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < n)


@triton.jit
def rows_kernel(
    x, w, scale, y, partial, arrived, m, n, k, ACTIVATION: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):
    """x (m k), w (n k), scale (n,) or None, y (m n); k a multiple of WIDE * SPLIT.

    The inputs are shared out among SPLIT programs: each leaves its sums in partial (SPLIT ROWS n), and the one that
    arrives last, by the count in arrived (n / TALL), which it sets back to zero, adds them in order.
    """
    if EARLY:
        gdc_launch_dependents()
    block = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    rows = block * TALL + tl.arange(0, TALL)
    columns = part * (k // SPLIT) + tl.arange(0, WIDE)
    tokens = tl.arange(0, ROWS)
    at = w + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + columns[None, :]
    x_at = x + tokens[None, :] * k + columns[:, None]
    known = (tokens < m)[None, :]
    if scale is not None:
        unit = tl.load(scale + rows, mask=rows < n, other=0)[:, None]
    if EARLY:
        if AHEAD > 0:
            LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
            lines = tl.arange(0, WIDE * AHEAD // LINE) * LINE
            ask(w + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + part * (k // SPLIT) + lines[None, :])
        gdc_wait()
    total = tl.zeros((TALL, ROWS), tl.float32)
    for start in tl.range(0, k // SPLIT, WIDE, num_stages=STAGES):
        tile = tl.load(at + start, eviction_policy="evict_first")
        values = tl.load(x_at + start, mask=known, other=0)
        if scale is not None:
            tile = widened_pairs(tile, values.dtype, EARLY)
        total = tl.dot(tile, values, total)
    here = tokens[None, :].to(tl.int64) * n + rows[:, None]
    stored = known & (rows < n)[:, None]
    if SPLIT > 1:
        place = partial + here
        step = ROWS * n.to(tl.int64)
        tl.store(place + part * step, total, mask=stored)
        # the sums of all threads are written before the count says so
        tl.debug_barrier()
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel")
        if before == SPLIT - 1:
            tl.store(arrived + block, 0)
            total = tl.zeros((TALL, ROWS), tl.float32)
            for i in range(SPLIT):
                total += tl.load(place + i * step, mask=stored, other=0, cache_modifier=".cg")
            if scale is not None:
                total *= unit
            tl.store(y + here, activated(total, ACTIVATION).to(y.dtype.element_ty), mask=stored)
    else:
        if scale is not None:
            total *= unit
        tl.store(y + here, activated(total, ACTIVATION).to(y.dtype.element_ty), mask=stored)


@triton.jit
def norm_kernel(
    x, delta, z, weight, bias, total, y, groups, size, x_stride, z_stride, eps, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, delta (m d), z (m d) by their row strides → total = x + delta, y = norm(total silu(z)) in groups of size.

    delta, z, bias: None where there is none; with bias the mean is taken off, and the gain is weight + 1.
    """
    if EARLY:
        gdc_launch_dependents()
    row = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    column = tl.arange(0, BLOCK)
    inside = column < size
    c = group * size + column
    gain = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
    if EARLY:
        tl.debug_barrier()
        gdc_wait()
    out = row * groups * size + c
    value = tl.load(x + row * x_stride + c, mask=inside, other=0)
    if delta is not None:
        value = (value.to(tl.float32) + tl.load(delta + out, mask=inside, other=0).to(tl.float32)).to(value.dtype)
        tl.store(total + out, value, mask=inside)
    value = value.to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * z_stride + c, mask=inside, other=0).to(tl.float32)
        value *= gate * sigmoid(gate)
    if bias is not None:
        value = tl.where(inside, value - tl.sum(value, 0) / size, 0)
        gain += 1
    value = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps) * gain
    if bias is not None:
        value += tl.load(bias + c, mask=inside, other=0).to(tl.float32)
    tl.store(y + out, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    x, position, rates, y, heads, x_token, x_head, HALF: tl.constexpr, P: tl.constexpr, EARLY: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):
    """x (m heads P) by its strides, position (m,) int64, rates (HALF,) float32 → y (m heads P), the pair (i, i + HALF)
    turned by the angle position * rates[i]."""
    if EARLY:
        gdc_launch_dependents()
    blocks = tl.cdiv(heads, ROWS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, PAIRS)
    rate = tl.load(rates + i, mask=i < HALF, other=0)
    if EARLY:
        tl.debug_barrier()
        gdc_wait()
    angle = tl.load(position + token).to(tl.float32) * rate
    # whole turns are taken off in float64: the functions for small angles are fast and need no memory
    turns = angle.to(tl.float64) * 0.15915494309189535
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    across, up = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    start = token * x_token + head[:, None] * x_head
    end = (token * heads + head[:, None]) * P
    real = (head < heads)[:, None]
    inside = real & (i < HALF)[None, :]
    first = tl.load(x + start + i[None, :], mask=inside, other=0).to(tl.float32)
    second = tl.load(x + start + HALF + i[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(y + end + i[None, :], (first * across - second * up).to(y.dtype.element_ty), mask=inside)
    tl.store(y + end + HALF + i[None, :], (second * across + first * up).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(y + end + j, tl.load(x + start + j, mask=real & (j < P), other=0), mask=real & (j < P))


def takes(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> bool:
    """Whether the kernels make this product; PyTorch's own is at least as fast for all others."""
    rows = x.numel() // x.shape[-1]
    return (0 < rows <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16)
            and (weight.dtype == x.dtype if scale is None else _reads(weight.dtype, x.device))
            and type(weight) in (Tensor, torch.nn.Parameter) and x.shape[-1] % UNIT == 0 and weight.shape[0] % 16 == 0
            and weight.is_contiguous() and weight.data_ptr() % 16 == 0)


def takes_norm(x: Tensor) -> bool:
    """Whether `norm_kernel` is for these rows; for many, programs that take several are faster."""
    return 0 < x.numel() // x.shape[-1] <= MOST_ROWS and x.shape[-1] <= LARGEST_NORM


@on_its_device
def thin_linear(x: Tensor, weight: Tensor, activation: str | None, dtype: torch.dtype,
                scale: Tensor | None = None) -> Tensor:
    """`hinny.ops.thin_linear` of what `takes` takes."""
    x = x if x.is_contiguous() else x.contiguous()
    (n, k), m = weight.shape, x.numel() // x.shape[-1]
    y, early = x.new_empty(*x.shape[:-1], n, dtype=dtype), overlaps(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    act, width = activation or "", weight.element_size()
    if m == 1:
        use = launch("row_kernel", x.device, n=n, k=k, width=width)
        row_kernel[(triton.cdiv(n, use["TALL"]),)](x, weight, scale, y, n, k, act, early, **use, **options)
        return y
    use = launch("rows_kernel", x.device, m=m, n=n, k=k, width=width)
    rows, split = max(16, triton.next_power_of_2(m)), use["SPLIT"]
    partial = arrived = None
    if split > 1:
        partial = x.new_empty(split * rows * n, dtype=torch.float32)
        arrived = _counters(x.device)
    rows_kernel[(triton.cdiv(n, use["TALL"]) * split,)](x, weight, scale, y, partial, arrived, m, n, k, act, early,
                                                        rows, **use, **options)
    return y


@cache
def _reads(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels widen weights of `dtype` on `device`: 8-bit floats need a GPU that knows them."""
    if dtype != torch.float8_e4m3fn:
        return dtype == torch.int8
    return (device.type == "cuda" and not torch.version.hip
            and torch.cuda.get_device_capability(device) >= (8, 9))


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros; launches that share them run one after the other."""
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)


@on_its_device
def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`hinny.ops.add_norm` of what `takes_norm` takes."""
    x, delta = (None if v is None else v.contiguous() for v in (x, delta))
    total = x if delta is None else torch.empty_like(x)
    return total, _norm(x, delta, None, weight, bias, total, eps, x.shape[-1])


@on_its_device
def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
    """`hinny.ops.gated_rms_norm` of few rows, without gradients."""
    return _norm(x.contiguous(), None, z, weight, None, None, eps, size)


def _norm(x: Tensor, delta: Tensor | None, z: Tensor | None, weight: Tensor, bias: Tensor | None, total: Tensor | None,
          eps: float, size: int) -> Tensor:
    d = x.shape[-1]
    y, m, early = torch.empty_like(x), x.numel() // d, overlaps(x.device)
    gate = None if z is None else z.flatten(0, -2)
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    block = triton.next_power_of_2(size)
    use = launch("norm_kernel", x.device, block=block)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    norm_kernel[(m * (d // size),)](x, delta, gate, weight, bias, total, y, d // size, size, d,
                                    0 if gate is None else gate.stride(0), eps, early, block, **use, **options)
    return y


@on_its_device
def rope(x: Tensor, position: Tensor, rates: Tensor) -> Tensor:
    """`hinny.ops.rope` of x (b t h p), few rows, at position (b, t) int64; rates (rope_dim/2,) float32."""
    b, t, heads, p = x.shape
    x = x if x.stride(-1) == 1 and (b == 1 or t == 1 or x.stride(0) == t * x.stride(1)) else x.contiguous()
    y, half, early = x.new_empty(x.shape), len(rates), overlaps(x.device)
    use = launch("rope_kernel", x.device, p=p)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    rest = triton.next_power_of_2(p - 2 * half) if p > 2 * half else 0
    rope_kernel[(b * t * triton.cdiv(heads, use["ROWS"]),)](
        x, position.contiguous(), rates, y, heads, x.stride(1) if t > 1 else x.stride(0), x.stride(2), half, p, early,
        triton.next_power_of_2(half), rest, **use, **options)
    return y


def compilations(table: str) -> list[Compilation]:
    """The kernels with every configuration of a shipped table."""
    cases, early = [], table == "sm90"
    kinds = dict.fromkeys(("x", "w", "y", "delta", "z", "total"), "*bf16") | {"partial": "*fp32", "arrived": "*i32",
                                                                              "eps": "fp32"}
    kinds |= dict.fromkeys(("weight", "bias", "rates", "scale"), "*fp32") | {"position": "*i64"}

    def case(name: str, kernel: Any, use: dict[str, Any], constants: dict[str, Any], may_spill: str = "",
             w: str = "bf16") -> None:
        given = dict(use)
        warps, stages = given.pop("num_warps"), given.pop("num_stages")
        constants = constants | given | {"EARLY": early}
        signature = {v: kinds.get(v, "i32") for v in kernel.arg_names if v not in constants}
        signature |= {"w": f"*{w}"} if "w" in signature else {}
        cases.append(Compilation(name, kernel, signature, constants, warps, stages,
                                 tuple(v for v in signature if v not in ("m", "groups", "eps")), may_spill,
                                 targets=KNOW_FLOAT8 if w == "fp8e4nv" else tuple(TARGETS)))

    found = rules(table)
    for number, rule in enumerate(found["row_kernel"]):
        for w, unscaled in _weights(rule, found["row_kernel"]):
            case(f"row_kernel-{number}-{w}", row_kernel, rule["use"], unscaled | {"ACTIVATION": "gelu"}, w=w)
    for number, rule in enumerate(found["rows_kernel"]):
        alone = {} if rule["use"]["SPLIT"] > 1 else {"partial": None, "arrived": None}
        for (w, unscaled), rows in product(_weights(rule, found["rows_kernel"]), (16, 32, 64)):
            case(f"rows_kernel-{number}-{rows}-{w}", rows_kernel, rule["use"],
                 alone | unscaled | {"ACTIVATION": "relu2", "ROWS": rows}, w=w)
    for number, rule in enumerate(found["norm_kernel"]):
        block = rule["when"].get("block", [0, LARGEST_NORM])[1]
        case(f"norm_kernel-{number}-added", norm_kernel, rule["use"], {"z": None, "BLOCK": block})
        case(f"norm_kernel-{number}-gated", norm_kernel, rule["use"],
             {"delta": None, "bias": None, "total": None, "BLOCK": block})
    for number, rule in enumerate(found["rope_kernel"]):
        case(f"rope_kernel-{number}", rope_kernel, rule["use"], {"HALF": 32, "P": 128, "PAIRS": 32, "REST": 64},
             may_spill="memory of the sine's way for large angles, which none takes")
    return cases


def _weights(rule: dict[str, Any], table: list[dict[str, Any]]) -> list[tuple[str, dict[str, None]]]:
    """Types of the weights that a rule of a table is for, and the constants that each brings."""
    wide: list[tuple[str, dict[str, None]]] = [("bf16", {"scale": None})]
    narrow: list[tuple[str, dict[str, None]]] = [("i8", {}), ("fp8e4nv", {})]
    if "width" in rule["when"]:
        return narrow
    return wide if any("width" in other["when"] for other in table) else wide + narrow


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    tiles = ((64, 128, 1, 3, 0), (64, 128, 2, 5, 4), (64, 128, 4, 3, 4), (64, 256, 1, 3, 2), (64, 256, 2, 3, 2),
             (32, 256, 1, 3, 2), (128, 128, 1, 3, 4))
    return {
        "row_kernel": [{"TALL": tall, "WIDE": wide, "STEPS": steps, "num_warps": 4, "num_stages": 1}
                       for tall, wide, steps in ((2, 4096, 1), (4, 2048, 2), (4, 2048, 3), (8, 1024, 3))],
        "rows_kernel": [{"TALL": tall, "WIDE": wide, "SPLIT": split, "STAGES": stages, "AHEAD": ahead,
                         "num_warps": 8 if tall == 128 else 4, "num_stages": 1}
                        for tall, wide, split, stages, ahead in tiles],
        "norm_kernel": [{"num_warps": warps, "num_stages": 1} for warps in (1, 4, 8, 16)],
        "rope_kernel": [{"ROWS": rows, "num_warps": 4, "num_stages": 1} for rows in (8, 16, 32)],
    }
