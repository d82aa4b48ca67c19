"""Initial weights of a model that is cut over ranks: drawn a part at a time, so that no rank ever holds the whole."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from hinny.model import Model
from hinny.objective import Objective


def init_weights(objective: Objective, seed: int, draw_on: torch.device | str = "cpu") -> None:
    """Fill the parameters that this rank holds of `objective` with those of `Model.init_weights(seed)`.

    draw_on: the device that draws. The CPU gives every mesh the same weights, bit for bit; a GPU is faster and gives
    others.
    """
    model = objective.model
    with torch.device("meta"):
        drawn = Model(model.config)
    generator = torch.Generator(draw_on).manual_seed(seed)
    names = set(model.state_dict())
    for prefix, part in drawn.parts().items():
        part.to_empty(device=draw_on)
        drawn.init_part(part, generator)
        mine = {f"{prefix}.{name}": tensor for name, tensor in part.state_dict().items()
                if f"{prefix}.{name}" in names}
        if mine:
            set_model_state_dict(model, mine, options=StateDictOptions(full_state_dict=True, strict=False))
        part.to_empty(device="meta")
