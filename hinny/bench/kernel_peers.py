"""mamba_ssm's Triton kernels as a peer: from its installed package or from its source folder on PYTHONPATH.

    MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation --no-binary mamba-ssm mamba-ssm==2.3.2.post1

fetches the source; unpack it, and have einops and packaging installed beside Triton.

Its package imports CUDA extensions when it is imported, which its Triton modules do not need; so those are reached by
a bare package with the same path. causal_conv1d, its convolution, is such an extension: there is no peer for that.
It chooses its own launch configurations, by measuring, for a minute or two at each new shape.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hinny.errors import BackendError

PEERS = ("mamba_ssm",)

DOWNLOAD = ("MAMBA_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation --no-binary mamba-ssm "
            "mamba-ssm==2.3.2.post1")
"""The command that fetches the peer's source."""


class MambaSSM:
    """The peer's functions with our arguments; `name` has its version."""

    def __init__(self) -> None:
        folder = _bare_package("mamba_ssm")
        found = re.search(r'__version__ = "(.+)"', (folder / "__init__.py").read_text())
        self.name = f"mamba_ssm {found[1] if found else '?'}"
        self._ssd = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        self._norm = _function("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
        self._update = _function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")

    def ssd(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, *,
            chunk_len: int, final: bool = False) -> Any:
        """`ops.ssd` with softplus; y, and the final state if asked for."""
        return self._ssd(x, dt, A, B, C, chunk_len, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=final)

    @property
    def chunk_scan(self) -> Any:
        """Its own function for `ops.ssd`, with its own arguments."""
        return self._ssd

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
        """`ops.gated_rms_norm`: the gate before the norm."""
        return self._norm(x, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=False)

    def ssd_update(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                   dt_bias: Tensor) -> Tensor:
        """One token of `ssd` with softplus: x (b h p), state (b h p n), updated in place → y (b h p)."""
        p, n = state.shape[2:]
        per_head = [v[..., None].expand(*v.shape, p) for v in (dt, D, dt_bias)]
        return self._update(state, x, per_head[0], A[:, None, None].expand(-1, p, n), B, C, D=per_head[1],
                            dt_bias=per_head[2], dt_softplus=True)


def find_peer(name: str) -> MambaSSM:
    """The peer of this name. Raises BackendError where it is not known, not found, or would be hobbled."""
    if name not in PEERS:
        raise BackendError(f"--against {name}: unknown peer; known for kernels: {', '.join(PEERS)}.")
    if torch.are_deterministic_algorithms_enabled():
        raise BackendError("mamba_ssm tunes nothing in PyTorch's deterministic mode, so it would be timed unfairly; "
                           "turn that mode off.")
    return MambaSSM()


def _bare_package(name: str) -> Path:
    """The folder of a package, whose modules can be imported from now on without its own __init__ being run."""
    if name in sys.modules:
        return Path(sys.modules[name].__path__[0])
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(f"--against {name}: it is not installed and not on PYTHONPATH. Its source alone is enough: "
                           f"{DOWNLOAD}, unpack it, and put its folder on PYTHONPATH (it needs einops and packaging "
                           "beside Triton).")
    bare = ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = bare
    return Path(bare.__path__[0])


def _function(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as fault:
        raise BackendError(f"{module}.{name} cannot be used as a peer: {fault}.") from None
