"""The held-out loss during training is that of the first windows, token by token."""

import pytest
import torch

from hinny.data.mix import heldout_batches
from hinny.model import Model
from hinny.objective import Objective
from hinny.train import heldout
from hinny.train.heldout import HeldOut
from hinny.train.optim import make_optimizer
from hinny.train.step import Stepper


def test_it_is_the_mean_cross_entropy_of_the_first_windows(recipe_of, data, monkeypatch):
    monkeypatch.setattr(heldout, "WINDOWS", 5)
    recipe = recipe_of("*-", micro_batch_size=2)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": data})})
    model = Model(recipe.model)
    model.init_weights(0)
    ours = HeldOut(recipe)(Stepper(recipe, Objective(model), make_optimizer(model, recipe.optim), torch.device("cpu")))
    losses = []
    for window in heldout_batches(recipe.data, seq_len=32, batch_size=1, windows=5):
        with torch.no_grad():
            logits = model(torch.from_numpy(window.tokens), segments=torch.from_numpy(window.segments))
        scored = torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(window.targets[0]), reduction="none")
        losses.append(scored[torch.from_numpy(window.mask[0])])
    assert ours == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
