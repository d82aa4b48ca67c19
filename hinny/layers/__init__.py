"""Layers: x (b t d) → x (b t d), some with a state. `LAYERS` maps a pattern's symbols to them.

A layer allocates in `__init__` (also on the meta device), fills itself in `init_weights`, computes in `forward` and
makes its own state in `init_state`. It knows nothing of parallelism: heads are counted from the tensors at hand.
"""

from hinny.layers.attention import Attention
from hinny.layers.mamba1 import Mamba1
from hinny.layers.mamba2 import Mamba2
from hinny.layers.mlp import MLP
from hinny.layers.norm import NORMS, LayerNorm1p, RMSNorm

Layer = Mamba1 | Mamba2 | Attention | MLP

LAYERS: dict[str, type[Mamba1] | type[Mamba2] | type[Attention] | type[MLP]] = {
    "1": Mamba1, "M": Mamba2, "*": Attention, "-": MLP}
"""Pattern symbol → layer."""

__all__ = ["LAYERS", "MLP", "NORMS", "Attention", "Layer", "LayerNorm1p", "Mamba1", "Mamba2", "RMSNorm"]
