"""One token of decoding: SSD states updated in place, alone, behind the convolution, and replayed.

Bytes: states read and written once (replayed: read each time, written once a turn), the token's inputs and output
beside them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hinny import ops
from hinny.bench.kernel_cases.case import Case, Draw, Inputs, shape_text
from hinny.bench.kernel_cases.ssd import LAYER_8B, WINDOW, Sizes
from hinny.bench.kernel_peers import MambaSSM

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPLAYED = 16


def cases() -> list[Case]:
    """The 8B layer's updates. mamba_ssm reads its float16 states as it does bfloat16's, and rounds them to nearest."""
    updates = [update_case(dict(b=b, **LAYER_8B), state) for state in ("fp32", "bf16") for b in (1, 8, 32, 128)]
    updates.append(update_case(dict(b=128, **LAYER_8B), "fp16", stochastic=True))
    return [*updates, *(replay_case(dict(b=b, **LAYER_8B), state) for state in ("fp32", "bf16") for b in (32, 128)),
            *(mixer_case(dict(b=b, **LAYER_8B)) for b in (1, 128))]


def update_case(sizes: Sizes, state: str, *, stochastic: bool = False) -> Case:
    """One token through the states; stochastic: they are rounded at random, and the seed is read from the GPU."""
    held = _states(sizes, state)
    rounding = dict(rounding="stochastic") if stochastic else {}
    return Case("ssd_update", shape_text(**sizes, state=state, **rounding),
                lambda draw: _inputs(draw, state=state, seeded=stochastic, **sizes), _update,
                None if stochastic else _peer_update, moved=2 * held + _token(**sizes), unit="TB/s",
                updated=("state",))


def replay_case(sizes: Sizes, state: str) -> Case:
    """The mean over a whole turn of the buffers: the sets of inputs stand at its different tokens."""
    b, h, p, g, n = (sizes[key] for key in "bhpgn")
    buffered = b * (2 * h * p + 4 * h + 2 * g * n)
    # the states in each time, out once a turn; half the buffers in, one token into them
    moved = _states(sizes, state) * (1 + 1 / REPLAYED) + buffered * (REPLAYED / 2 + 1) + _token(**sizes)
    return Case("ssd_update.replayed", shape_text(**sizes, state=state, length=REPLAYED),
                lambda draw: _replay_inputs(draw, state=state, **sizes), _replayed, _peer_replayed,
                peer_lacks="buffers, each state written", moved=moved, sets=REPLAYED,
                updated=("state", "buffered_x", "buffered_B", "buffered_dt", "cursor"))


def mixer_case(sizes: Sizes) -> Case:
    """One token through a layer's convolution and SSD, float32 states."""
    b, h, p, g, n = (sizes[key] for key in "bhpgn")
    held = _states(sizes, "fp32") + 4 * b * (h * p + 2 * g * n) * (WINDOW - 1)
    return Case("mamba2_update", shape_text(**sizes, state="fp32"), lambda draw: _mixer_inputs(draw, **sizes),
                partial(_mixer, sizes=(h * p, g * n)), _peer_mixer, peer_lacks="its convolution",
                moved=2 * held + _token(**sizes), updated=("state", "conv_state"), roundings=2)


def _states(sizes: Sizes, state: str) -> int:
    return sizes["b"] * sizes["h"] * sizes["p"] * sizes["n"] * STATES[state].itemsize


def _token(b: int, h: int, p: int, g: int, n: int) -> int:
    return 2 * b * (2 * h * p + 2 * g * n + h)


def _inputs(draw: Draw, *, b: int, h: int, p: int, g: int, n: int, state: str, seeded: bool = False) -> Inputs:
    seed = {"seed": draw.whole(2 ** 62)} if seeded else {}
    return {"state": draw.normal(b, h, p, n, dtype=STATES[state]), "x": draw.normal(b, 1, h, p),
            "dt": draw.normal(b, 1, h), "B": draw.normal(b, 1, g, n), "C": draw.normal(b, 1, g, n),
            **draw.state_space(h), **seed}


def _update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
            seed: Tensor | None = None) -> Tensor:
    # the plain form that this is checked against has states of 32 bits, which are not rounded
    seed = seed if state.element_size() == 2 else None
    return ops.ssd_update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, seed=seed)


def _peer_update(peer: MambaSSM, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                 dt_bias: Tensor) -> Tensor:
    return peer.ssd_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, dt_bias)[:, None]


def _replay_inputs(draw: Draw, *, b: int, h: int, p: int, g: int, n: int, state: str) -> Inputs:
    inputs = _inputs(draw, b=b, h=h, p=p, g=g, n=n, state=state)
    empty = ops.make_replay(inputs["state"], g, torch.bfloat16, REPLAYED)
    # the first set's buffers are full, so that what is checked writes the states
    token = REPLAYED - draw.number % REPLAYED
    return {**inputs, "buffered_x": draw.normal(*empty.x.shape), "buffered_B": draw.normal(*empty.B.shape),
            "buffered_dt": draw.uniform(1e-3, 0.1, *empty.dt.shape), "cursor": torch.full_like(empty.cursor, token)}


def _replayed(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
              buffered_x: Tensor, buffered_dt: Tensor, buffered_B: Tensor, cursor: Tensor) -> Tensor:
    replay = ops.Replay(buffered_x, buffered_dt, buffered_B, cursor)
    return ops.ssd_update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, replay=replay)


def _peer_replayed(peer: MambaSSM, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                   dt_bias: Tensor, **_buffers: Tensor) -> Tensor:
    return _peer_update(peer, state, x, dt, A, B, C, D, dt_bias)


def _mixer_inputs(draw: Draw, *, b: int, h: int, p: int, g: int, n: int) -> Inputs:
    inputs = _inputs(draw, b=b, h=h, p=p, g=g, n=n, state="fp32")
    channels = h * p + 2 * g * n
    return {**{name: v.flatten(2) if name in "xBC" else v for name, v in inputs.items()},
            "conv_state": draw.normal(b, channels, WINDOW - 1, dtype=torch.float32),
            "weight": draw.uniform(-0.5, 0.5, channels, WINDOW), "bias": draw.uniform(-0.5, 0.5, channels)}


def _mixer(state: Tensor, conv_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
           dt_bias: Tensor, weight: Tensor, bias: Tensor, *, sizes: tuple[int, int]) -> Tensor:
    parts = (sizes[0], sizes[1], sizes[1])
    return ops.mamba2_update(state, conv_state, x, dt, A, B, C, weight.split(parts), bias.split(parts), D=D,
                             dt_bias=dt_bias, dt_softplus=True)


def _peer_mixer(peer: MambaSSM, state: Tensor, conv_state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
                C: Tensor, D: Tensor, dt_bias: Tensor, **_convolution: Tensor) -> Tensor:
    (_, h, p, n), (b, t, _) = state.shape, x.shape
    return _peer_update(peer, state, x.view(b, t, h, p), dt, A, B.view(b, t, -1, n), C.view(b, t, -1, n), D, dt_bias)
