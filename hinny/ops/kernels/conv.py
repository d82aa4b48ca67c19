"""Causal convolution: a program walks `rows` tokens of some channels of a sequence, the last w-1 inputs in registers.

    conv_forward    reads each input once (and the w-1 before its first token), in batches of UNROLL tokens whose loads
                    are all in flight together; the program with the last token writes the final state
    conv_step       one token of `rows` sequences
    conv_backward   the same walk, w-1 rows ahead of the token whose dx it writes: it computes the activations' input
                    again, keeps the w gradients that reach a token in registers, and sums the weights' gradients;
                    every program leaves its sums, `sum_parts` adds them up

A token's documents are told apart as the walk crosses from one id to another: what is in registers then counts as zero.
Windows and taps are tuples of (CHANNELS,) tiles: tap k belongs to the input k tokens earlier, weight[:, w-1-k].
Letters: b batch, t time, ch channels, w window.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.gates import sigmoid, silu_slope
from hinny.ops.kernels.launches import launch, rules
from hinny.ops.kernels.operators import differentiable
from hinny.ops.kernels.sums import sum_into
from hinny.ops.kernels.waves import processors, whole_waves


@triton.jit
def read_taps(weight, bias, c, inside, W: tl.constexpr):
    """The W taps of channels c, from weight (ch W) in one coalesced read, and their bias."""
    column = tl.arange(0, triton.next_power_of_2(W))
    at = c[:, None] * W + column[None, :]
    tile = tl.load(weight + at, mask=inside[:, None] & (column < W)[None, :], other=0).to(tl.float32)
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.sum(tl.where((column == W - 1 - k)[None, :], tile, 0), 1),)
    if bias is not None:
        offset = tl.load(bias + c, mask=inside, other=0).to(tl.float32)
    else:
        offset = tl.zeros(c.shape, tl.float32)
    return taps, offset


@triton.jit
def inputs_before(x, initial, ids, at, token, stride_t, c, inside, W: tl.constexpr):
    """The W-1 inputs before token `at`, newest first; zero where of another document than `token`, float32.

    x and ids point at token 0, initial at the state's first column.
    """
    window = ()
    same = True
    if ids is not None:
        newer = tl.load(ids + token)
    for k in tl.static_range(1, W):
        time = at - k
        row = x + time.to(tl.int64) * stride_t
        value = tl.load(row + c, mask=inside & (time >= 0), other=0).to(tl.float32)
        if initial is not None:
            value += tl.load(initial + (time + W - 1), mask=inside & (time < 0), other=0).to(tl.float32)
        if ids is not None:
            # what came before token 0 is of its document
            older = tl.load(ids + tl.maximum(time, 0))
            same = same & (older == newer)
            newer = older
            value = tl.where(same, value, 0)
        window += (value,)
    return window


@triton.jit
def weighted(window, taps, total):
    """total + the sum of window times taps."""
    for k in tl.static_range(len(taps)):
        total += window[k] * taps[k]
    return total


@triton.jit
def enter(value, window, continues, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """The last W inputs, newest first, with `value` the newest; the older ones zero unless it continues a document."""
    inputs = (value.to(tl.float32),)
    for k in tl.static_range(W - 1):
        inputs += (tl.where(continues, window[k], 0) if SEGMENTS else window[k],)
    return inputs


@triton.jit
def write_state(final, state, window, inside, W: tl.constexpr):
    """Stores the W-1 newest inputs of a window, oldest first, at final + state, in one coalesced write.

    For where the state is much of the traffic; the layouts it takes cost registers.
    """
    if W > 1:
        column = tl.arange(0, triton.next_power_of_2(W - 1))[None, :]
        tile = window[0][:, None]
        for k in tl.static_range(1, W - 1):
            tile = tl.where(column == W - 2 - k, window[k][:, None], tile)
        tile, at = tl.broadcast(tile, state[:, None] + column)
        tl.store(final + at, tile, mask=inside[:, None] & (column < W - 1))


@triton.jit
def activated(total, SILU: tl.constexpr):
    return total * sigmoid(total) if SILU else total


@triton.jit(do_not_specialize=["t", "rows"])
def conv_forward(
    x, weight, bias, initial, ids, y, final, t, ch, rows, stride_b, stride_t,
    W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """x (b t ch) by its strides, initial (b ch w-1), ids (b t) → y (b t ch), final (b ch w-1)."""
    SEGMENTS: tl.constexpr = ids is not None
    blocks = tl.cdiv(ch, CHANNELS)
    part = tl.program_id(0) // blocks
    b = (part // tl.cdiv(t, rows)).to(tl.int64)
    start = part % tl.cdiv(t, rows) * rows
    end = tl.minimum(start + rows, t)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < ch
    taps, offset = read_taps(weight, bias, c, inside, W)
    state = (b * ch + c) * (W - 1)
    x += b * stride_b
    if initial is not None:
        initial += state
    if ids is not None:
        ids += b * t
        id = tl.load(ids + start)
    window = inputs_before(x, initial, ids, start, start, stride_t, c, inside, W)
    x_row = x + start.to(tl.int64) * stride_t
    y_row = y + (b * t + start) * ch
    batches = (end - start) // UNROLL
    for batch in range(batches):
        values = ()
        continues = ()
        for r in tl.static_range(UNROLL):
            values += (tl.load(x_row + c, mask=inside),)
            x_row += stride_t
            if SEGMENTS:
                next_id = tl.load(ids + start + batch * UNROLL + r)
                continues += (next_id == id,)
                id = next_id
        for r in tl.static_range(UNROLL):
            inputs = enter(values[r], window, continues[r] if SEGMENTS else True, W, SEGMENTS)
            out = activated(weighted(inputs, taps, offset), SILU)
            tl.store(y_row + c, out.to(y.dtype.element_ty), mask=inside)
            window = inputs[:W - 1]
            y_row += ch
    for token in range(start + batches * UNROLL, end):
        here = True
        if SEGMENTS:
            next_id = tl.load(ids + token)
            here = next_id == id
            id = next_id
        inputs = enter(tl.load(x_row + c, mask=inside), window, here, W, SEGMENTS)
        out = activated(weighted(inputs, taps, offset), SILU)
        tl.store(y_row + c, out.to(y.dtype.element_ty), mask=inside)
        window = inputs[:W - 1]
        x_row += stride_t
        y_row += ch
    if end == t:
        left = inputs_before(x, initial, ids, t, t - 1, stride_t, c, inside, W)
        for k in tl.static_range(W - 1):
            tl.store(final + state + (W - 2 - k), left[k], mask=inside)


@triton.jit(do_not_specialize=["batch", "rows"])
def conv_step(
    x, weight, bias, initial, y, final, batch, ch, rows, stride_b,
    W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
):
    """One token: x (b ch) by its row stride, initial (b ch w-1) → y (b ch), final (b ch w-1); `rows` sequences each."""
    blocks = tl.cdiv(ch, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < ch
    taps, offset = read_taps(weight, bias, c, inside, W)
    first = tl.program_id(0) // blocks * rows
    for i in range(tl.minimum(rows, batch - first)):
        sequence = first.to(tl.int64) + i
        state = (sequence * ch + c) * (W - 1)
        inputs = (tl.load(x + sequence * stride_b + c, mask=inside).to(tl.float32),)
        for k in tl.static_range(1, W):
            if initial is not None:
                inputs += (tl.load(initial + state + (W - 1 - k), mask=inside).to(tl.float32),)
            else:
                inputs += (tl.zeros_like(offset),)
        out = activated(weighted(inputs, taps, offset), SILU)
        tl.store(y + sequence * ch + c, out.to(y.dtype.element_ty), mask=inside)
        write_state(final, state, inputs, inside, W)


@triton.jit
def before_activation(dy, inputs, taps, offset, SILU: tl.constexpr):
    """The gradient of the weighted sum, from that of the output: dy silu'(sum)."""
    dy = dy.to(tl.float32)
    return dy * silu_slope(weighted(inputs, taps, offset)) if SILU else dy


@triton.jit
def add_products(sums, inputs, gradient, W: tl.constexpr):
    """The weights' gradients so far, one for each tap and the bias behind them, with those of one more token."""
    found = ()
    for k in tl.static_range(W):
        found += (sums[k] + gradient * inputs[k],)
    found += (sums[W] + gradient,)
    return found


@triton.jit
def reaching(gradients, continues, taps, FROM: tl.constexpr, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """What the gradients of W - FROM tokens, oldest first, send to the input FROM tokens before the first of them.

    continues[k - 1]: token k continues the document of the one before it. Also returns whether all of them do.
    """
    total = tl.zeros_like(taps[0])
    same = tl.full((), 1, tl.int1)
    for k in tl.static_range(W - FROM):
        if SEGMENTS and k > 0:
            same = same & continues[k - 1]
            total += tl.where(same, gradients[k], 0) * taps[FROM + k]
        else:
            total += gradients[k] * taps[FROM + k]
    return total, same


@triton.jit(do_not_specialize=["t", "rows"])
def conv_backward(
    x, weight, bias, initial, ids, dy, dfinal, dx, parts_of, dinitial, t, ch, rows, stride_b, stride_t,
    dy_stride_b, dy_stride_t, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The forward's inputs, dy (b t ch) by its strides, dfinal (b ch w-1) → dx (b t ch), dinitial (b ch w-1),
    parts_of (b * parts of a sequence, w + 1 (w without a bias), ch) float32.

    "Ahead" is the token w-1 after the one whose dx is written; a program sums the weights' gradients of the tokens that
    it sees ahead, the first program of a sequence also those of the first w-1.
    """
    SEGMENTS: tl.constexpr = ids is not None
    TAPS: tl.constexpr = W + (bias is not None)
    blocks = tl.cdiv(ch, CHANNELS)
    part = tl.program_id(0) // blocks
    b = (part // tl.cdiv(t, rows)).to(tl.int64)
    start = part % tl.cdiv(t, rows) * rows
    end = tl.minimum(start + rows, t)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < ch
    taps, offset = read_taps(weight, bias, c, inside, W)
    state = (b * ch + c) * (W - 1)
    x += b * stride_b
    if initial is not None:
        initial += state
    if ids is not None:
        ids += b * t
        id = tl.load(ids + start)
    window = inputs_before(x, initial, ids, start, start, stride_t, c, inside, W)
    x_row = x + start.to(tl.int64) * stride_t
    dy_row = dy + b * dy_stride_b + start.to(tl.int64) * dy_stride_t
    sums = ()
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros_like(offset),)
    gradients = ()
    continues = ()
    for r in tl.static_range(W - 1):
        real = inside & (start + r < t)
        value = tl.load(x_row + c, mask=real, other=0)
        next_dy = tl.load(dy_row + c, mask=real, other=0)
        x_row += stride_t
        dy_row += dy_stride_t
        here = True
        if SEGMENTS:
            next_id = tl.load(ids + tl.minimum(start + r, t - 1))
            here = next_id == id
            id = next_id
            continues += (here,)
        inputs = enter(value, window, here, W, SEGMENTS)
        gradient = tl.where(real, before_activation(next_dy, inputs, taps, offset, SILU), 0)
        sums = add_products(sums, inputs, tl.where(start == 0, gradient, 0), W)
        gradients += (gradient,)
        window = inputs[:W - 1]
    continues = continues[1:]
    if dinitial is not None:
        if start == 0:
            for k in tl.static_range(1, W):
                total, same = reaching(gradients, continues, taps, k, W, SEGMENTS)
                if dfinal is not None:
                    column = W - 1 - t - k
                    more = tl.load(dfinal + state + column, mask=inside & (column >= 0), other=0)
                    total += tl.where(same, more, 0)
                tl.store(dinitial + state + (W - 1 - k), total.to(dinitial.dtype.element_ty), mask=inside)
    dx_row = dx + (b * t + start) * ch
    # the batches see no token behind the end of the sequence
    batches = tl.maximum(tl.minimum(end, t - W + 1) - start, 0) // UNROLL
    for batch in range(batches):
        values = ()
        for r in tl.static_range(UNROLL):
            values += (tl.load(x_row + c, mask=inside), tl.load(dy_row + c, mask=inside))
            x_row += stride_t
            dy_row += dy_stride_t
            if SEGMENTS:
                next_id = tl.load(ids + start + batch * UNROLL + (r + W - 1))
                continues += (next_id == id,)
                id = next_id
        for r in tl.static_range(UNROLL):
            # the flags of w-1 tokens, the last one ahead, and of those that follow in this batch
            inputs = enter(values[2 * r], window, continues[W - 2] if SEGMENTS else True, W, SEGMENTS)
            gradient = before_activation(values[2 * r + 1], inputs, taps, offset, SILU)
            sums = add_products(sums, inputs, gradient, W)
            gradients += (gradient,)
            total, same = reaching(gradients, continues, taps, 0, W, SEGMENTS)
            tl.store(dx_row + r * ch + c, total.to(dx.dtype.element_ty), mask=inside)
            window = inputs[:W - 1]
            gradients = gradients[1:]
            continues = continues[1:]
        dx_row += UNROLL * ch
    for token in range(start + batches * UNROLL, end):
        ahead = token + W - 1
        real = inside & (ahead < t)
        here = True
        if SEGMENTS:
            next_id = tl.load(ids + tl.minimum(ahead, t - 1))
            here = next_id == id
            id = next_id
            continues += (here,)
        inputs = enter(tl.load(x_row + c, mask=real, other=0), window, here, W, SEGMENTS)
        gradient = before_activation(tl.load(dy_row + c, mask=real, other=0), inputs, taps, offset, SILU)
        gradient = tl.where(real, gradient, 0)
        sums = add_products(sums, inputs, gradient, W)
        gradients += (gradient,)
        total, same = reaching(gradients, continues, taps, 0, W, SEGMENTS)
        if dfinal is not None:
            column = ahead - t
            more = tl.load(dfinal + state + column, mask=inside & (column >= 0), other=0)
            total += tl.where(same, more, 0)
        tl.store(dx_row + c, total.to(dx.dtype.element_ty), mask=inside)
        window = inputs[:W - 1]
        gradients = gradients[1:]
        continues = continues[1:]
        x_row += stride_t
        dy_row += dy_stride_t
        dx_row += ch
    mine = parts_of + part.to(tl.int64) * TAPS * ch + c
    for k in tl.static_range(TAPS):
        tl.store(mine + k * ch, sums[k], mask=inside)


def _launched(kernel: str, x: Tensor, w: int) -> tuple[int, dict[str, int]]:
    """Blocks of channels, and the constants and sizes of the launch, for x (b t ch)."""
    b, t, ch = x.shape
    use = launch(kernel, x.device, batch=b, elements=b * t * ch, w=w, ch=ch)
    return triton.cdiv(ch, use["CHANNELS"]), use | {"W": w}


def _readable(x: Tensor) -> Tensor:
    """x with its channels side by side; its other strides are as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor]:
    (b, t, ch), w = x.shape, weight.shape[1]
    x = _readable(x)
    y, final = _fake(x, weight, bias, initial_state, segments, silu)
    weight, bias, initial_state, segments = _contiguous(weight, bias, initial_state, segments)
    blocks, use = _launched("conv_step" if t == 1 else "conv_forward", x, w)
    rows = use.pop("rows")
    if t == 1:
        conv_step[blocks * triton.cdiv(b, rows),](x, weight, bias, initial_state, y, final, b, ch, rows, x.stride(0),
                                                  SILU=silu, **use)
    else:
        conv_forward[blocks * b * triton.cdiv(t, rows),](
            x, weight, bias, initial_state, segments, y, final, t, ch, rows, x.stride(0), x.stride(1), SILU=silu, **use)
    return y, final


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor]:
    b, t, ch = x.shape
    return x.new_empty((b, t, ch)), x.new_empty((b, ch, weight.shape[1] - 1), dtype=torch.float32)


def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, dy: Tensor,
    dfinal: Tensor | None, silu: bool, initial_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; empty where that was not given or not wanted."""
    (b, t, ch), w = x.shape, weight.shape[1]
    x, dy = _readable(x), _readable(dy)
    results = _fake_backward(x, weight, bias, initial_state, segments, dy, dfinal, silu, initial_wanted)
    dx, dweight, dbias, dinitial = results
    blocks, use = _launched("conv_backward", x, w)
    slots = use.pop("resident") * processors(x.device)
    rows = whole_waves(t, use.pop("rows"), blocks * b, slots, use["UNROLL"])
    parts = b * triton.cdiv(t, rows)
    parts_of = x.new_empty((parts, w + (bias is not None), ch), dtype=torch.float32)
    weight, bias, initial_state, segments, dfinal = _contiguous(weight, bias, initial_state, segments, dfinal)
    conv_backward[blocks * parts,](
        x, weight, bias, initial_state, segments, dy, dfinal if w > 1 else None, dx, parts_of,
        dinitial if initial_wanted and w > 1 else None, t, ch, rows, x.stride(0), x.stride(1), dy.stride(0),
        dy.stride(1), SILU=silu, **use)
    sum_into(parts_of, dweight, None if bias is None else dbias)
    return results


def _fake_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, dy: Tensor,
    dfinal: Tensor | None, silu: bool, initial_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = x.new_empty
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            nothing(0) if bias is None else bias.new_empty(bias.shape),
            nothing(0) if initial_state is None or not initial_wanted else initial_state.new_empty(initial_state.shape))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(run: Any, ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, segments = ctx.saved_tensors
    # only the final state was used: its gradient flows through the same kernel
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dinitial = run(x, weight, bias, initial_state, segments, dy, dfinal, ctx.silu,
                                       ctx.needs_input_grad[3])
    return (dx, dweight, None if bias is None else dbias, dinitial if ctx.needs_input_grad[3] else None, None, None)


_convolve = differentiable("causal_conv", _forward, backward, fake=_fake, fake_backward=_fake_backward, save=_save,
                           gradients=_gradients)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
    initial_state: Tensor | None = None, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`hinny.ops.causal_conv` on a GPU; x may be a slice of a wider tensor. The shapes have been checked."""
    return _convolve(x, weight, bias, initial_state, segments, activation == "silu")


def compilations(table: str) -> list[Compilation]:
    """Every kernel with every configuration of a shipped table: bfloat16 with all arguments and with few, float32."""
    cases: dict[tuple, Compilation] = {}
    for kernel in (conv_forward, conv_step, conv_backward):
        for number, rule in enumerate(rules(table)[kernel.fn.__name__]):
            low, high = rule["when"].get("w", [4, 4])
            use = {name: value for name, value in rule["use"].items() if name not in ("rows", "resident")}
            for w, dtype, full in ((min(high, 8), "bf16", False), (min(high, 8), "bf16", True), (low, "fp32", False)):
                name = f"{kernel.fn.__name__}-{number}-w{w}-{dtype}{'-full' if full else ''}"
                # rules that differ in what is no constant share their compilation
                cases.setdefault((kernel.fn.__name__, *use.values(), w, dtype, full),
                                 _compilation(name, kernel, use, w, dtype, full))
    return list(cases.values())


def _compilation(name: str, kernel: Any, use: dict[str, int], w: int, dtype: str, full: bool) -> Compilation:
    kinds = {"weight": "*fp32", "bias": "*fp32", "initial": "*fp32", "ids": "*i64", "dfinal": "*fp32",
             "dinitial": "*fp32", "parts_of": "*fp32", "final": "*fp32"}
    kinds |= dict.fromkeys(("x", "y", "dy", "dx"), f"*{dtype}")
    constants: dict[str, Any] = {"W": w, "SILU": True}
    constants |= {argument: use[argument] for argument in ("CHANNELS", "UNROLL") if argument in use}
    missing = () if full else ("initial", "ids", "dfinal", "dinitial")
    constants |= {argument: None for argument in missing if argument in kernel.arg_names}
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = tuple(argument for argument in signature if argument not in ("t", "batch", "rows"))
    return Compilation(name, kernel, signature, constants, use["num_warps"], use["num_stages"], aligned)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU."""
    forward = ((32, 256, 8, 2), (64, 256, 8, 2), (16, 256, 8, 2), (32, 256, 4, 2), (64, 256, 4, 2), (32, 512, 8, 4),
               (32, 256, 8, 1), (64, 256, 4, 1), (64, 128, 8, 1), (32, 256, 16, 4), (128, 256, 16, 2))
    steps = ((1, 256, 4), (4, 256, 4), (4, 128, 2), (2, 256, 4), (8, 256, 4), (4, 256, 2))
    backward = ((256, 10, 256, 4, 2), (128, 10, 256, 4, 2), (512, 10, 256, 4, 2), (256, 0, 256, 4, 2),
                (64, 0, 256, 4, 2), (256, 8, 256, 2, 2), (256, 8, 256, 4, 4), (256, 5, 256, 8, 4), (256, 5, 512, 4, 4),
                (32, 0, 128, 4, 1), (256, 6, 256, 8, 2), (256, 6, 512, 8, 4))
    return {
        "conv_forward": _uses("rows CHANNELS UNROLL num_warps", forward),
        "conv_step": _uses("rows CHANNELS num_warps", steps),
        "conv_backward": _uses("rows resident CHANNELS UNROLL num_warps", backward),
    }


def _uses(names: str, sizes: tuple[tuple[int, ...], ...]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), values, strict=True)) | {"num_stages": 1} for values in sizes]
