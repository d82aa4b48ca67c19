"""Memory of a training step on one GPU: what is alive at the moments at which it may be most.

    loss        the last layers' outputs are there, and the loss makes its gradients, a block of logits at a time
    backward    of the loss, and of each block: gradients of what it keeps, what it computes again
    embedding   the last gradient: of all the vocabulary's rows
    update      AdamW, fused: in place

Weights, their gradients and Adam's two moments are float32 and always there; gradients are not, in the first pass of a
step, where that has one pass only. With bf16 every projection keeps a copy of its weight for the backward, unless its
block is recomputed. With FSDP (replicate x shard x context > 1) weights, gradients and moments are cut over shard x
context, no copy is kept, and there are whole, in the activations' type: embedding and head, to the end of the backward;
in the backward of a block its weights and their gradients, and the weights of the next as they come, beside the float32
buffer in which gradients of the one before are summed; at the end the gradients of embedding and head, and such a
buffer for both. With replicas the sums of all blocks stay to the end of the pass: in the first pass of a step they
become the gradients, in the others they are there beside them.

Bytes are those that the allocator gives out: CUDA itself, NCCL and what the allocator holds back come on top, and CUDA
graphs hold the activations' memory in a pool of their own, of the same size. Letters: v vocabulary, d model, i tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hinny import counts, pattern
from hinny.config import ModelConfig
from hinny.memory.layers import LAYER_BYTES, LayerBytes, Share

LOGIT_BYTES, LOGIT_ROWS, ROW_UNIT = 2 ** 30, 128, 64
"""A block of logits: bytes at most, rows at least and in steps of as many, columns in steps of (hinny.ops)."""

WORKSPACE = 2 * 32 * 2 ** 20
"""cuBLAS's memory on Hopper: for the thread that runs the forward pass, and for the backward's."""

PARTS = ("weights", "gradients", "moments", "gathered", "casts", "activations", "carried", "loss", "working",
         "workspace")

Recompute = str | list[str] | None


@dataclass(frozen=True)
class Plan:
    """What a recipe says that memory depends on. `sizes`: of the mesh's dimensions, 1 where it has none."""

    sizes: Mapping[str, int]
    seq_len: int
    """Tokens of a sequence in a pass: of a segment, where sequences are cut into them."""
    micro_batch: int
    micro_batches: int
    """That a rank has in a step: passes, but for segments."""
    width: int = 2
    """Bytes of a number of the activations: 2 with bf16, 4 with fp32."""
    recompute: Recompute = None
    gpipe: bool = False
    packed: bool = False
    segments: int = 1
    """Of a sequence: passes that follow each other with carried states (train.segment_len)."""

    def size(self, name: str) -> int:
        return self.sizes.get(name, 1)

    @property
    def shards(self) -> int:
        return self.size("shard") * self.size("context")

    @property
    def fsdp(self) -> bool:
        """Whether weights are gathered, and gradients summed over ranks (hinny.parallel.apply)."""
        return self.size("replicate") * self.shards > 1

    @property
    def share(self) -> Share:
        return Share(self.micro_batch, -(-self.seq_len // self.size("context")), self.size("context"),
                     self.size("tensor"), self.width, self.packed)


def phases(model: ModelConfig, plan: Plan) -> dict[str, dict[str, int]]:
    """Moment → part → bytes, on the rank that needs the most then; the parts are those of PARTS."""
    stages = pattern.stages(model.pattern) if plan.size("pipeline") > 1 else [pattern.parse(model.pattern)]
    found: dict[str, dict[str, int]] = {}
    for number, symbols in enumerate(stages):
        stage = _Stage(model, plan, symbols, number, len(stages))
        for name, parts in stage.phases():
            if name not in found or sum(parts.values()) > sum(found[name].values()):
                found[name] = parts
    return found


class _Stage:
    """The layers of one rank, with embedding or head where it has them."""

    def __init__(self, model: ModelConfig, plan: Plan, symbols: Sequence[str], number: int, stages: int) -> None:
        self.plan, self.share, self.symbols = plan, plan.share, symbols
        self.layers = [LAYER_BYTES[symbol](model, self.share) for symbol in symbols]
        self.first, self.last = number == 0, number == stages - 1
        self.tied = model.tie_embeddings
        self.d, tensor = model.d_model, plan.size("tensor")
        self.words = -(-model.vocab_size // tensor)
        self.in_flight = plan.micro_batches if plan.gpipe else min(stages - number, plan.micro_batches)
        norm = self.d * (2 if model.norm == "layernorm1p" else 1)
        self.weights = [-(-counts.layer(model, symbol).parameters // tensor) + norm for symbol in symbols]
        self.matrices = self.words * self.d * (self.first + self.last - (self.first and self.last and self.tied))
        self.parameters = sum(self.weights) + self.matrices + norm * self.last
        self.before = plan.micro_batches * plan.segments > 1
        self.carried = self._carried(model) if plan.segments > 1 else 0

    def phases(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Every moment's name and its parts."""
        kept = sum(map(self._kept, range(len(self.layers))))
        # the other micro-batches on their way through a pipeline also keep what they brought and what they gave
        others = (self.in_flight - 1) * (kept + 2 * self.plan.width * self.share.between * self.d)
        others += self._inputs() * self.in_flight
        casts = sum(map(self._casts, range(len(self.layers)))) * self.in_flight
        if self.last:
            norm = self.plan.width * self.share.between * self.d
            parts = self._parts(self.parameters if self.before else 0, kept + others + norm, casts, self._root())
            yield "loss", parts | {"loss": self._loss()}
            yield "backward", parts | {"loss": self._loss_gradients()}
        done = self.parameters if self.before else self.words * self.d * self.last
        for i in reversed(range(len(self.layers))):
            again = self.layers[i].kept - self._kept(i) + self._again(i)
            made = self.layers[i].working + again + (0 if self.plan.fsdp else 4 * self.layers[i].largest)
            done += 0 if self.before else self.weights[i]
            parts = self._parts(done, kept + others, casts, self._root() + self._gathered() + self._sums(i + 1))
            yield "backward", parts | {"working": made, "loss": self._held()}
            kept, casts = kept - self._kept(i), casts - self._casts(i)
        if self.first:
            summed = 4 * self.matrices + self._sums(0) if self.plan.fsdp else 0
            yield "embedding", self._parts(self.parameters, others, casts, summed) | {"working": self._embedding(),
                                                                                      "loss": self._held()}
        if self.plan.fsdp:
            yield "embedding", self._parts(self.parameters, others, casts, self._last_sum() + self._sums(0))
        yield "update", self._parts(self.parameters, 0, 0, 0)

    def _parts(self, gradients: int, activations: int, casts: int, gathered: int) -> dict[str, int]:
        own = -(-self.parameters // self.plan.shards)
        return dict.fromkeys(PARTS, 0) | {
            "weights": 4 * own, "gradients": 4 * -(-gradients // self.plan.shards), "moments": 8 * own,
            "gathered": gathered, "casts": casts, "activations": activations, "carried": self.carried,
            "workspace": WORKSPACE}

    def _root(self) -> int:
        return self.plan.width * self.matrices if self.plan.fsdp else 0

    def _gathered(self) -> int:
        """Of the largest block: its weights, those of the next, its gradients, the sums of the one before."""
        return (3 * self.plan.width + 4) * max(one.matrices for one in self.layers) if self.plan.fsdp else 0

    def _sums(self, first: int) -> int:
        """Of the blocks from `first` on: their gradients' sums, where these are added to what earlier passes left."""
        kept = self.plan.size("replicate") > 1 and self.before
        return 4 * -(-sum(self.weights[first:]) // self.plan.shards) if kept else 0

    def _last_sum(self) -> int:
        """Of embedding and head, whose own gradients are gone: what is summed; a copy where a rank has all of it; the
        sum, where it is added to what earlier passes left."""
        whole = 4 * self.matrices
        return whole * (2 if self.plan.shards == 1 else 1) + (-(-whole // self.plan.shards) if self.before else 0)

    def _recomputed(self, i: int) -> str | None:
        mode = self.plan.recompute
        return mode if mode is None or isinstance(mode, str) else "full" if self.symbols[i] in mode else None

    def _kept(self, i: int) -> int:
        one, mode = self.layers[i], self._recomputed(i)
        return one.kept if mode is None else one.selective if mode == "selective" else one.full

    def _cast(self, one: LayerBytes) -> int:
        """Bytes of the projections' copies in the products' type."""
        return 2 * one.matrices if self.plan.width == 2 and not self.plan.fsdp else 0

    def _casts(self, i: int) -> int:
        return self._cast(self.layers[i]) if self._recomputed(i) is None else 0

    def _again(self, i: int) -> int:
        return 0 if self._recomputed(i) is None else self._cast(self.layers[i])

    def _inputs(self) -> int:
        """Tokens, targets, mask, and the documents of whole sequences; a segment's once more."""
        one = 17 * self.share.tokens + (8 * self.share.tokens * self.share.context if self.plan.packed else 0)
        return one if self.plan.segments == 1 else one * (self.plan.segments + 1)

    def _carried(self, model: ModelConfig) -> int:
        """States, float32, that a segment began with, and those that it leaves."""
        state = sum(counts.layer(model, symbol).state for symbol in self.symbols)
        return 2 * 4 * self.plan.micro_batch * -(-state // self.plan.size("tensor"))

    def _loss(self) -> int:
        """Gradients of i d and v d numbers in float32, the logits, the head's weight and rows in the products' type."""
        width, rows = self.plan.width, self.share.tokens
        columns = -(-self.words // ROW_UNIT) * ROW_UNIT
        block = min(max(LOGIT_BYTES // (columns * width) // LOGIT_ROWS, 1) * LOGIT_ROWS, rows)
        cast = 2 * self.words * self.d if width == 2 and not self.plan.fsdp else 0
        hidden = width * rows * self.d
        return 4 * (rows + self.words) * self.d + width * block * (columns + self.d) + 8 * rows + cast + hidden

    def _loss_gradients(self) -> int:
        """As the loss made them, and times what came from outside, in the types of the weight and the rows."""
        weight = self.plan.width if self.plan.fsdp else 4
        return (4 + weight) * self.words * self.d + (4 + self.plan.width) * self.share.tokens * self.d

    def _held(self) -> int:
        """The head's gradient, where it waits: for the embedding's of the same matrix, or for the sum over ranks."""
        if not self.last or not (self.plan.fsdp or (self.tied and self.first)):
            return 0
        return (self.plan.width if self.plan.fsdp else 4) * self.words * self.d

    def _embedding(self) -> int:
        """The gradient of the embedded tokens as it comes, and in float32, and that of the matrix."""
        weight = self.plan.width if self.plan.fsdp else 4
        return (weight * self.words + (self.plan.width + weight) * self.share.tokens) * self.d


def peak(model: ModelConfig, plan: Plan) -> dict[str, Any]:
    """The moment at which the most is alive: its name, its parts that are not zero, and their sum."""
    found = phases(model, plan)
    name = max(found, key=lambda phase: sum(found[phase].values()))
    return {"phase": name, "memory_bytes": sum(found[name].values()),
            "parts": {part: size for part, size in found[name].items() if size},
            "phases": {phase: sum(parts.values()) for phase, parts in found.items()}}
