"""What a sequence carries from one piece to the next: keys and values, convolution inputs, SSM states.

A `State` is made by `Model.init_state`, updated by every forward pass that receives it, and independent of how the
sequence was cut: prefill in pieces of any size, then single tokens, gives the numbers of one full pass.

Its rows may stand at different positions (`join`): each goes on at its own, and sees nothing but its own tokens.
"""

from __future__ import annotations

from hinny.state.batch import State, join
from hinny.state.carried import Carried, CarriedLayer
from hinny.state.layers import KVState, LayerState, SSMState

__all__ = ["Carried", "CarriedLayer", "KVState", "LayerState", "SSMState", "State", "join"]
