"""Compiling kernels ahead of time, for GPUs that need not be there: what tests hold every launch configuration to."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
"""Target → Triton's backend, architecture and threads a warp."""

SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
"""Target → bytes of shared memory that one program may have."""


@dataclass(frozen=True)
class Compilation:
    """One kernel with one configuration, as it is launched.

    signature   argument → type ("*bf16", "*fp32", "i32", "i64", "fp32"); constants are left out of it
    constants   argument → value, also None for a pointer that is not given
    aligned     arguments divisible by 16, as the launcher would find them; all pointers if empty
    may_spill   why this one may spill registers on sm_90; empty: it may not
    registers   most registers a thread, where the launch sets that
    targets     what it is launched on; a Gluon kernel is written for one
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    may_spill: str = ""
    registers: int | None = None
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Report:
    """What the compiler said of a kernel; registers and spills (bytes a thread) are 0 where the target tells none."""

    shared: int
    registers: int = 0
    spills: int = 0
    assembly: Mapping[str, Any] = field(default_factory=dict, repr=False)


def kernel_modules() -> list[ModuleType]:
    """The modules that hold kernels, those with `compilations`; imports Triton."""
    package = importlib.import_module("hinny.ops.kernels")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__, "hinny.ops.kernels."))
    return [module for module in map(importlib.import_module, names) if "compilations" in vars(module)]


def compile_for(target: str, case: Compilation) -> Report:
    """Compiles `case` for one of TARGETS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constants)) ^ set(names)
    assert not unknown, f"{case.name}: {sorted(unknown)} are given or missing"
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    pointers = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    aligned = case.aligned or pointers
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = dict(case.constants)
    if TARGETS[target][0] == "hip" and constants.get("PRECISION") == "tf32x3":
        constants["PRECISION"] = "ieee"  # as launches on AMD GPUs do, which have no tf32x3
    gluon = isinstance(case.kernel, GluonJITFunction)
    source = (GluonASTSource if gluon else ASTSource)(fn=case.kernel, signature=signature,
                                                      constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps} | ({} if gluon else {"num_stages": case.num_stages})
    if case.registers:
        options["maxnreg"] = case.registers
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, spills = _resources(kernel.asm["cubin"]) if "cubin" in kernel.asm else (0, 0)
    return Report(shared=kernel.metadata.shared, registers=registers, spills=spills, assembly=kernel.asm)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory or stack a thread, of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], max(found["STACK"], found["LOCAL"])
