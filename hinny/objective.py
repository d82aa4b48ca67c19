"""A language model and its loss as one module: what training differentiates, and what is cut over processes."""

from __future__ import annotations

from torch import Tensor, nn

from hinny import ops
from hinny.model import Model
from hinny.state import Carried


class Objective(nn.Module):
    """Tokens and targets → the summed loss. In evaluation mode without any z-loss."""

    entropy = staticmethod(ops.linear_cross_entropy)
    entropy_z = staticmethod(ops.linear_cross_entropy_z)
    """The two losses of the last hidden states; whoever spreads the vocabulary over processes puts others with their
    signatures here."""

    def __init__(self, model: Model, z_loss: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(self, tokens: Tensor, targets: Tensor, mask: Tensor,
                segments: Tensor | None = None, carried: Carried | None = None) -> tuple[Tensor, Tensor]:
        """tokens, targets (b t) int64, mask (b t) bool, segments (b t) int or None → as `loss`.

        Where ranks share the tokens of a sequence, tokens, targets and mask are this rank's, segments those of the
        whole sequence. carried: where the tokens are a segment of longer sequences, as in Model.hidden.
        """
        return self.loss(self.model.hidden(tokens, carried, segments), targets, mask)

    def loss(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (b t d) → the loss in nats, summed over the targets that count, and the z-loss that is part of it."""
        weight = self.model.output_weight
        if self.z_loss is None or not self.training:
            total = self.entropy(hidden, weight, targets, mask, reduction="sum")
            return total, total.new_zeros(())
        return self.entropy_z(hidden, weight, targets, mask, z_loss=self.z_loss, reduction="sum")
