"""Tensor parallelism of inference: ranks share each layer's heads and channels, and the words of the vocabulary.

    embedding      each rank looks up its words, zeros for the others, summed    x (b t d), whole on every rank
    layer          this rank's heads and channels of all tokens, summed          x (b t d), whole on every rank
    head           logits of this rank's words, gathered                         (r v)

Layers are cut by the training's plan (hinny.parallel.plan), but parameters stay plain tensors and the residual stream
is whole on every rank: a decoding step has no tokens to share. A rank's states are those of its heads. Every rank runs
the same tokens in the same order.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hinny.checkpoint.store import open_model
from hinny.config import ModelConfig
from hinny.config.fit import check_tensor
from hinny.infer.head import logits
from hinny.infer.precision import to_bfloat16
from hinny.infer.quantise import Precision, check_precision, to_precision
from hinny.infer.sums import Sums
from hinny.model import Model
from hinny.parallel.mesh import share
from hinny.parallel.plan import PLAN, ROWS
from hinny.parallel.tensor import SYMBOLS
from hinny.run import Run


def tensor_parallel(model: Model, sums: Sums) -> None:
    """Cut `model` in place to this rank's part, on any device or meta, and let its layers sum over the ranks.

    Afterwards it has no gradients; tokens, states and results are as before, but a state holds this rank's heads, and
    `output_weight` this rank's words: logits come from `Head`. It may be quantised or prepared then, not before.
    ConfigError, before any change, if sizes do not fit.
    """
    check_tensor(model.config, sums.size)
    model.requires_grad_(False)
    for block in model.blocks:
        symbol = SYMBOLS[type(block.layer)]
        _cut(block.layer, PLAN[symbol], sums)
        block.layer.register_forward_hook(_Sum(sums))
        if symbol == "1":
            block.layer.x_proj = SummedParts(cast(nn.Module, block.layer.x_proj), sums)
    if model.head is not None:
        _cut(model.head, {"weight": ROWS}, sums)
    _cut(model.embedding, {"weight": ROWS}, sums)
    model.embedding = WordsEmbedding(model.embedding.weight, sums)


class WordsEmbedding(nn.Embedding):
    """The embedding whose rows are cut: each rank gives zeros for words that others have, and the sum is whole.

    Whole on every rank, it would spare one sum in 57 to 65, but take 1 GB more of each of two GPUs for an 8B model. Cut
    by its columns it could not be the head's matrix too, where both are tied.
    """

    def __init__(self, weight: Tensor, sums: Sums) -> None:
        """weight (v/ranks d): this rank's words."""
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.sums = sums

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b t) → (b t d)."""
        count = self.weight.shape[0]
        rows = tokens - self.sums.rank * count
        elsewhere = (rows < 0) | (rows >= count)
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self.sums(found.masked_fill(elsewhere[..., None], 0))


class SummedParts(nn.Module):
    """Mamba-1's x_proj: it reads cut channels, and every channel uses all that it makes. Takes the parts of `whole`."""

    def __init__(self, whole: nn.Module, sums: Sums) -> None:
        super().__init__()
        for name, part in whole.named_children():
            self.add_module(name, part)
        self.sums = sums

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (b t channels/ranks) → the sum over the ranks of each part's product."""
        made = [part(x) for part in self.children()]
        return self.sums(torch.cat(made, -1)).split([one.shape[-1] for one in made], -1)


class Head:
    """Logits of the first `words` words from a model that `tensor_parallel` has cut."""

    def __init__(self, model: Model, words: int, sums: Sums) -> None:
        assert words <= model.config.vocab_size, f"{words} of {model.config.vocab_size} words"
        self.model = model
        self.words = words
        self.sums = sums

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (r d) → (r words), in float32 or, for a float64 model, in float64; equal bits on every rank."""
        return self.sums.gather(logits(hidden, self.model.output_weight))[:, :self.words]


def random_model(config: ModelConfig, sums: Sums, *, bf16: bool = True, seed: int = 0) -> Model:
    """This rank's part of a model with random weights, on its device, where nothing but that part is ever held.

    Weights have the sizes of initial ones, but depend on the number of ranks: they serve for speed alone. bf16: the
    matrices are bfloat16 (hinny.infer.precision).
    """
    with torch.device("meta"):
        model = Model(config)
    tensor_parallel(model, sums)
    if bf16:
        to_bfloat16(model)
    model.to_empty(device=sums.device)
    # what is whole on every rank is norms, whose initial gains are constants: ranks may draw apart
    generator = torch.Generator(sums.device).manual_seed(seed * sums.size + sums.rank)
    with torch.no_grad():
        for part in model.parts().values():
            model.init_part(part, generator)
    return model.eval()


def load_tensor(run: Run, sums: Sums, dtype: Precision | None = None) -> Model:
    """This rank's part of a run's model at its latest checkpoint, on its device; dtype as in `hinny.infer.engine.load`.

    Of a conversion's files only this part is read, of a training's one whole tensor after the other: the whole model is
    never in memory. Every rank verifies all files by itself.
    """
    check_precision(dtype)
    model, weights = open_model(run)
    tensor_parallel(model, sums)
    for path, parameter in list(model.named_parameters()):
        whole = weights.read(path)
        # along the one dimension, if any, that was cut
        lesser = [dim for dim, size in enumerate(parameter.shape) if size != whole.shape[dim]]
        part = share(whole, sums.rank, sums.size, lesser[0]) if lesser else whole
        assert part.shape == parameter.shape, (path, part.shape, parameter.shape)
        kept = part.to(whole.dtype if dtype == "stored" else parameter.dtype, copy=True,
                       memory_format=torch.contiguous_format)
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner).register_parameter(name, nn.Parameter(kept, requires_grad=False))
    if dtype not in (None, "stored"):
        to_bfloat16(model)  # before it moves: half the bytes
    to_precision(model.to(sums.device), dtype)
    return model.eval()


def _cut(module: nn.Module, plan: dict[str, int], sums: Sums) -> None:
    """Leaves of the parameters of `module` that `plan` names this rank's part, along the dimension that it says."""
    for path, parameter in list(module.named_parameters()):
        if path in plan:
            owner, _, name = path.rpartition(".")
            # a copy of its own: a view would keep the whole alive
            part = share(parameter.detach(), sums.rank, sums.size, plan[path]).clone(
                memory_format=torch.contiguous_format)
            module.get_submodule(owner).register_parameter(name, nn.Parameter(part, requires_grad=False))


class _Sum:
    """Hook behind a layer: the sum of the ranks' outputs."""

    def __init__(self, sums: Sums) -> None:
        self.sums = sums

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        return self.sums(output)
