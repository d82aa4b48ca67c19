"""SSD forward and backward, alone and between a layer's convolution and gated norm; one sequence's prefill.

Bytes: every input read once, every result written once. Operations: those of chunks of 64, with the scores in full, as
a kernel computes them; the results do not depend on the chunks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text
from hinny.bench.kernel_peers import MambaSSM

Sizes = dict[str, int]

LAYER_8B: Sizes = dict(h=128, p=64, g=8, n=128)
LAYER_130M: Sizes = dict(h=24, p=64, g=1, n=128)
CHUNK = 64
WINDOW = 4
EPS = 1e-5
TRAINED = ("x", "dt", "A", "B", "C", "D", "dt_bias")
TRAINED_AROUND = ("z", "gain", "wx", "wB", "wC", "bx", "bB", "bC")


def cases() -> list[Case]:
    """The rows: sizes, and the peer's chunk length."""
    trained = [(dict(b=4, t=4096, **LAYER_8B), 256), (dict(b=1, t=32768, **LAYER_8B), 256),
               (dict(b=16, t=2048, **LAYER_130M), 128)]
    found = [ssd_case(sizes, chunk, backward=backward) for sizes, chunk in trained for backward in (False, True)]
    found += [mixer_case(sizes, chunk, backward=backward)
              for sizes, chunk in trained[::2] for backward in (False, True)]
    return [*found, *(prefill_case(dict(b=1, t=2048, **layer), chunk)
                      for layer, chunk in ((LAYER_8B, 256), (LAYER_130M, 128)))]


def ssd_case(sizes: Sizes, chunk: int, *, backward: bool) -> Case:
    """y: forward, or from its gradient those of everything that a layer trains."""
    moved, flops = _least(**sizes, backward=backward)
    return Case("ssd.backward" if backward else "ssd.forward", shape_text(**sizes, peer_chunk=chunk),
                lambda draw: _inputs(draw, **sizes), _ssd, partial(_peer_ssd, chunk_len=chunk), moved=moved,
                flops=flops, wanted=TRAINED if backward else ())


def prefill_case(sizes: Sizes, chunk: int) -> Case:
    """One sequence's y and final state, as prefill wants them."""
    moved, flops = _least(**sizes, backward=False)
    state = 4 * sizes["b"] * sizes["h"] * sizes["p"] * sizes["n"]
    return Case("ssd.prefill", shape_text(**sizes, peer_chunk=chunk), lambda draw: _inputs(draw, **sizes), _ssd,
                partial(_peer_ssd, chunk_len=chunk, final=True), moved=moved + state, flops=flops)


def mixer_case(sizes: Sizes, chunk: int, *, backward: bool) -> Case:
    """All that lies between a Mamba-2 layer's two projections."""
    moved, flops = _least(**sizes, backward=backward)
    # the gate, and in the backward its gradient; convolved values are counted as if they were never stored
    moved += (4 if backward else 2) * sizes["b"] * sizes["t"] * sizes["h"] * sizes["p"]
    return Case("mixer.backward" if backward else "mixer.forward",
                shape_text(**sizes, peer_chunk=chunk, peer_conv="ours"), lambda draw: _mixer_inputs(draw, **sizes),
                partial(_mixer, group_size=_group(**sizes)),
                partial(_peer_mixer, chunk_len=chunk, group_size=_group(**sizes)), moved=moved, flops=flops,
                roundings=3, wanted=TRAINED + TRAINED_AROUND if backward else ())


def _least(b: int, t: int, h: int, p: int, g: int, n: int, *, backward: bool) -> tuple[float, float]:
    """Bytes and operations of SSD with bf16 sequences."""
    tokens = b * t
    x, keys, steps = 2 * tokens * h * p, 2 * tokens * g * n, 2 * tokens * h
    scores = 2 * tokens * g * CHUNK * n
    if not backward:
        # x, B, C, dt in, y out; into and out of states, scores times x
        return 2 * x + 2 * keys + steps, tokens * h * (4 * n * p + 2 * CHUNK * p) + scores
    # x, dy, B, C, dt in, gradients out; states and their gradients, dx, dB and dC from them; dscores, dx in chunks
    return 3 * x + 4 * keys + 2 * steps, tokens * h * (10 * n * p + 4 * CHUNK * p) + 3 * scores


def _group(h: int, p: int, g: int, **_rest: int) -> int:
    return h * p // g


def _inputs(draw: Draw, *, b: int, t: int, h: int, p: int, g: int, n: int) -> Inputs:
    # steps that vary this much keep the plain form's chunks, and with them its memory, near the shipped recipes'
    return {"x": draw.normal(b, t, h, p), "dt": draw.normal(b, t, h).mul_(0.3), "B": draw.normal(b, t, g, n),
            "C": draw.normal(b, t, g, n), **draw.state_space(h)}


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> tuple[Tensor, ...]:
    return ops.ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)


def _peer_ssd(peer: MambaSSM, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, *,
              chunk_len: int, final: bool = False) -> Tensor | tuple[Tensor, ...]:
    return peer.ssd(x, dt, A, B, C, D, dt_bias, chunk_len=chunk_len, final=final)


def _mixer_inputs(draw: Draw, *, b: int, t: int, h: int, p: int, g: int, n: int) -> Inputs:
    inputs = _inputs(draw, b=b, t=t, h=h, p=p, g=g, n=n)
    inputs |= {"z": draw.normal(b, t, h * p), "gain": draw.normal(h * p, dtype=torch.float32)}
    for part, channels in (("x", h * p), ("B", g * n), ("C", g * n)):
        inputs |= {f"w{part}": draw.uniform(-0.5, 0.5, channels, WINDOW), f"b{part}": draw.uniform(-0.5, 0.5, channels)}
    return inputs


def _mixer(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, z: Tensor, gain: Tensor,
           wx: Tensor, bx: Tensor, wB: Tensor, bB: Tensor, wC: Tensor, bC: Tensor, *, group_size: int) -> Tensor:
    """As `layers.mamba2` calls the ops."""
    y, *_ = ops.mamba2(x, dt, A, B, C, (wx, wB, wC), (bx, bB, bC), D=D, dt_bias=dt_bias, dt_softplus=True)
    return ops.gated_rms_norm(y.flatten(2), z, gain, EPS, group_size)


def _peer_mixer(peer: MambaSSM, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
                z: Tensor, gain: Tensor, wx: Tensor, bx: Tensor, wB: Tensor, bB: Tensor, wC: Tensor, bC: Tensor, *,
                chunk_len: int, group_size: int) -> Tensor:
    """The peer's convolution is a package in CUDA, to be built (0.26 ms forward at the 8B shape); ours stands in."""
    x, B, C = (ops.causal_conv(part.flatten(2), weight, bias, activation="silu")[0].view_as(part)
               for part, weight, bias in ((x, wx, bx), (B, wB, bB), (C, wC, bC)))
    y = peer.ssd(x, dt, A, B, C, D, dt_bias, chunk_len=chunk_len)
    return peer.gated_rms_norm(y.flatten(2), z, gain, EPS, group_size)
