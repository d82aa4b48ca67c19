"""How the SSD kernels are compiled with the shipped launches, and the launches worth measuring on a new GPU."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl

from hinny.ops.kernels import ssd_backward, ssd_forward
from hinny.ops.kernels.compile import Compilation
from hinny.ops.kernels.hopper_boundaries import hopper_boundaries
from hinny.ops.kernels.hopper_forward import hopper_forward
from hinny.ops.kernels.hopper_gradients import hopper_gradients
from hinny.ops.kernels.launches import FALLBACK, find, rules
from hinny.ops.kernels.ssd_call import HEADS_A_PROGRAM, tile

H, G = 16, 2
NUMBERS = ("t", "chunks", "parts", "part_chunks", "row_stride", "size")
IN_INPUT_TYPE = ("x", "B", "C", "dy", "z", "y", "ungated", "edges", "dedges", "dx", "pairs", "dB", "dC", "dt", "ddt")
BY_TILE = {"ssd_gram": ("x", "dy", "B", "C"), "ssd_inputs": ("x", "dy", "B", "C", "dedges", "dx"),
           "ssd_queries": ("dy", "B", "C", "edges", "dedges", "dC"), "ssd_keys": ("x", "C", "dedges", "dB")}
"""Kernel → arguments that are tensor descriptors."""

HOPPER: tuple[tuple[Any, int, int, tuple[str, ...], bool], ...] = (
    (hopper_forward, 128, 1, ("initial", "local", "local_sums", "flags"), False),
    (hopper_forward, 128, 2, ("flags",), False), (hopper_forward, 64, 1, ("D", "local", "local_sums", "flags"), False),
    (hopper_forward, 128, 1, ("local", "local_sums"), False), (hopper_forward, 128, 2, ("local", "local_sums"), False),
    (hopper_boundaries, 128, 1, ("initial", "dfinal", "local", "local_sums"), False),
    (hopper_boundaries, 128, 2, (), False), (hopper_boundaries, 64, 1, ("local", "local_sums"), False),
    (hopper_boundaries, 128, 1, ("states_desc", "initial", "dfinal", "dinitial"), True),
    (hopper_gradients, 128, 1, (), True), (hopper_gradients, 128, 1, ("D",), False),
    (hopper_gradients, 64, 1, (), True))
"""Gluon kernels: state, blocks of 64 columns, arguments that are not given; whether parts are walked by themselves, or
the heads of a group are one program's."""

WHOLE = ("size", "chunks", "parts", "part_chunks", "length", "H", "per_group", "batch", "heads", "split", "t",
         "tiles")
"""Arguments of the Gluon kernels that are whole numbers."""

SPILLS = {
    "ssd_forward": "the state, its rounded copy and a chunk's scores fill the registers; bfloat16 without a "
                   "gate runs on hopper_forward, which spills nothing",
    "ssd_inputs": "chunks of 128 with spills took 0.73 ms at the 8B shape, chunks of 64 without 0.55, but then the "
                  "states at chunk edges, twice as many, cost 0.2 ms more",
    "hopper_gradients": "a few numbers that the compiler takes out of the loop in which partitions wait for work",
    "ssd_queries": "products of float32 keep each operand in three pieces, and states of 128 by 256 fill the registers",
}
"""Kernel → why it may spill with a shipped configuration for Hopper; docs/log.md has the measurements."""


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches worth measuring on a new GPU, for bfloat16 heads of 64 and a state of 128."""
    plain = [{"num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (1, 2, 3)]
    walks = [use | {"PROGRAMS": 264, "SHORTEST": 8} for use in plain]
    return {"ssd_forward": [use | {"Q": 64} for use in walks],
            "ssd_boundaries": [use | {"BP": width} for width in (32, 64) for use in walks],
            "ssd_gram": [use | {"Q": Q, "PROGRAMS": 264} for Q in (64, 128) for use in plain],
            "ssd_inputs": plain, "ssd_queries": plain, "ssd_keys": plain}


def compilations(table: str) -> list[Compilation]:
    """Every kernel in bfloat16 with all that is optional and in float32 without; for Hopper, more sizes and forms."""
    sizes = [(64, 128, "bf16", True), (64, 128, "fp32", False), (128, 256, "bf16", False)]
    if table != FALLBACK:
        sizes += [(64, 128, "bf16", False), (128, 64, "bf16", False)]
    cases = []
    for p, n, dtype, full in sizes:
        bits = 32 if dtype == "fp32" else 16
        lengths = (find(table, kernel, p=p, n=n, bits=bits)["Q"] for kernel in ("ssd_forward", "ssd_gram"))
        cases += [_compilation(table, kernel, length, p, n, bits, dtype, full) for kernel, length in _kernels(*lengths)]
    return cases + ([_on_hopper(*case) for case in HOPPER] if "hopper_forward" in rules(table) else [])


def _on_hopper(kernel: Any, n: int, blocks: int, absent: tuple[str, ...], local: bool) -> Compilation:
    """A Gluon kernel for heads of `blocks` times 64 columns; `absent` arguments are not given."""
    name = kernel.fn.__name__
    use = find("sm90", name, p=64 * blocks, n=n, bits=16)
    Q = find("sm90", "hopper_forward" if name == "hopper_forward" else "ssd_gram", p=64 * blocks, n=n, bits=16)["Q"]
    tokens = Q // 2 if kernel is hopper_gradients else Q
    tiles = {v: [1, tokens, 64] for v in ("x_desc", "y_desc", "dy_desc", "dx_desc")} | {"decays_desc": [Q]}
    tiles |= {v: [1, tokens, n] for v in ("B_desc", "C_desc")}
    tiles |= {v: [1, 64, n] for v in ("states_desc", "S_desc", "dS_desc")}
    constants = {"BLOCKS": blocks, "N": n, "STAGES": use.get("STAGES"), "LOCAL": local}
    constants |= {key: use[key] for key in ("ORDER", "KEYS", "MIDDLE", "PRODUCE") if key in use} | dict.fromkeys(absent)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = {"flags": "*i32"} | (dict.fromkeys(("dB", "dC"), "*bf16") if local else {})
    signature = {}
    for argument in kernel.arg_names:
        if argument in tiles and argument not in constants:
            signature[argument] = _tensordesc(tiles[argument], "fp32" if argument == "decays_desc" else "bf16")
        elif argument not in constants:
            signature[argument] = "i32" if argument in WHOLE else kinds.get(argument, "*fp32")
    label = f"{name}-n{n}-blocks{blocks}{'-local' if local else ''}{'-' if absent else ''}{'-'.join(absent)}"
    return Compilation(label, kernel, signature, constants, use["num_warps"], registers=use.get("maxnreg"),
                       may_spill=SPILLS.get(name, ""))


def _tensordesc(shape: list[int], kind: str) -> str:
    layout = (gl.NVMMASharedLayout(0, 32, 1) if kind == "fp32"
              else gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16))
    return f"tensordesc<{kind}{shape},{layout!r}>"


def _kernels(Q: int, backward: int) -> list[tuple[Any, int]]:
    """Kernels and the chunk lengths that they run with."""
    module = ssd_backward
    return [(ssd_forward.ssd_prepare, Q), (ssd_forward.ssd_forward, Q), (ssd_forward.ssd_boundaries, backward),
            (module.ssd_gram, backward), (module.ssd_inputs, backward), (module.ssd_queries, backward),
            (module.ssd_keys, backward), (module.ssd_finish, backward)]


def _compilation(table: str, kernel: Any, Q: int, p: int, n: int, bits: int, dtype: str, full: bool) -> Compilation:
    name = kernel.fn.__name__
    use = find(table, name, p=p, n=n, bits=bits) if name in rules(table) else {"num_warps": 4, "num_stages": 3}
    constants: dict[str, Any] = dict(H=H, G=G, P=p, N=n, BP=use.get("BP", tile(p)), BN=tile(n), Q=Q, EVEN=not full,
                                     SPLIT=1, BH=HEADS_A_PROGRAM, SOFTPLUS=True, LOCAL=False, PRECISION="tf32x3")
    constants |= {} if full else dict.fromkeys(("z", "documents", "initial", "local", "local_sums", "ungated", "flags"))
    constants |= {"crossed": None} if name == "ssd_finish" and not full else {}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    rows = Q // 2 if name == "ssd_gram" else Q
    tiles = {"edges": [1, tile(p), tile(n)], "dedges": [1, tile(p), tile(n)]}
    tiles |= {v: [1, rows, 1, tile(p)] for v in ("x", "dy", "dx")}
    tiles |= {v: [1, rows, 1, tile(n)] for v in ("B", "C", "dB", "dC")}
    signature = {}
    for v in kernel.arg_names:
        if v in constants:
            continue
        kind = (dtype if v in IN_INPUT_TYPE else "i32" if v in (*NUMBERS, "documents") else
                "i64" if v == "flags" else "fp32")
        signature[v] = (kind if v in NUMBERS else f"tensordesc<{kind}{tiles[v]}>" if v in BY_TILE.get(name, ())
                        else f"*{kind}")
    return Compilation(f"{name}-{dtype}-p{p}-n{n}{'-everything' if full else ''}", kernel, signature, constants,
                       use["num_warps"], use["num_stages"], may_spill=SPILLS.get(name, "") if table == "sm90" else "")
