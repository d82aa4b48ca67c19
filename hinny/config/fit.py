"""Whether a recipe can be cut over a mesh: what a plan of it (`hinny show`) and its training refuse alike. No torch.

`sizes` are those of the mesh's dimensions, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hinny import pattern
from hinny.config.sections import ModelConfig, Recipe
from hinny.config.segments import check_segments
from hinny.errors import ConfigError


def check_fit(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """ConfigError where batch, sequences, or what the layers have cannot be shared equally, or graphs not be had."""
    check_batch(recipe, sizes)
    check_segments(recipe)
    local_length(recipe, sizes)
    check_context(recipe.model, recipe.train.seq_len, sizes["context"])
    check_tensor(recipe.model, sizes["tensor"])
    if (world := math.prod(sizes.values())) > 1:
        refuse_graphs(recipe, f"{world} processes")


def check_batch(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """ConfigError unless ranks with sequences of their own take equal parts of a batch, in whole micro-batches."""
    train, ranks = recipe.train, sizes["replicate"] * sizes["shard"]
    if train.batch_size % (train.micro_batch_size * ranks):
        raise ConfigError(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}) x parallel.replicate ({sizes['replicate']}) x parallel.shard "
            f"({sizes['shard']}) = {train.micro_batch_size * ranks}: each of {ranks} ranks takes equal parts of a "
            "batch in whole micro-batches. Change one of them.")


def local_length(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Tokens of each sequence, or segment, that a rank sees; ConfigError if ranks cannot share one."""
    length, context, tensor = recipe.train.pass_len, sizes["context"], sizes["tensor"]
    key = "train.seq_len" if recipe.train.segment_len is None else "train.segment_len"
    if length % (context * tensor):
        raise ConfigError(f"{key} ({length}) must be a multiple of parallel.context ({context}) x "
                          f"parallel.tensor ({tensor}) = {context * tensor}: each rank takes as many tokens. "
                          f"The next multiple is {-(-length // (context * tensor)) * context * tensor}.")
    return length // context


def refuse_graphs(recipe: Recipe, where: str) -> None:
    """ConfigError if the recipe asks for CUDA graphs; `where` says what it would run on that is not one GPU."""
    if recipe.train.cuda_graphs:
        raise ConfigError(f"train.cuda_graphs is true and this training is on {where}: it is for one GPU alone. Give "
                          "train.cuda_graphs=false.")


def check_context(config: ModelConfig, tokens: int, ranks: int) -> None:
    """ConfigError if sequences of so many tokens cannot be cut over so many `context` ranks."""
    if ranks > 1:
        length = chunk_length(tokens, ranks)
        for layer in (config.mamba1, config.mamba2):
            if layer is not None:
                check_window(length, layer.d_conv, ranks)


def chunk_length(tokens: int, ranks: int) -> int:
    """Tokens of a chunk of a sequence of so many, two chunks a rank; ConfigError if they are not equal."""
    count = 2 * ranks
    if tokens < count or tokens % count:
        below = tokens // count * count
        nearest = f"{below} or {below + count}" if below else str(count)
        raise ConfigError(
            f"train.seq_len ({tokens}) must be a multiple of 2 x parallel.context = {count}, because each rank "
            f"takes two of {count} equal chunks. Use a length of {nearest}, or another parallel.context.")
    return tokens // count


def check_window(length: int, width: int, ranks: int) -> None:
    """ConfigError if chunks of so many tokens are shorter than what a convolution of `width` taps borrows."""
    if length < width - 1:
        count = 2 * ranks
        raise ConfigError(
            f"train.seq_len ({count * length}) gives chunks of {length} tokens with parallel.context "
            f"({ranks}); a convolution of d_conv = {width} borrows {width - 1} from one of them. Use a "
            f"train.seq_len of at least {count * (width - 1)}, or a smaller parallel.context.")


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """ConfigError unless `ranks` divides everything that is cut in a model of `config`."""
    counts = list(_counts(config))
    common = math.gcd(*(count for _, count, _ in counts))
    for key, count, what in counts:
        if count % ranks:
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ConfigError(
                f"parallel.tensor ({ranks}) must divide {key} ({count}): each rank takes as many whole {what}. "
                f"Change {key} (the next multiple is {-(-count // ranks) * ranks}), or set parallel.tensor to a number "
                f"that divides all that it cuts in this model: {allowed}.")


def _counts(config: ModelConfig) -> Iterator[tuple[str, int, str]]:
    """Key, number and name of everything that is cut as a whole."""
    yield "model.vocab_size", config.vocab_size, "words"
    symbols = pattern.parse(config.pattern)
    if "M" in symbols:
        assert config.mamba2 is not None
        yield "model.mamba2.n_groups", config.mamba2.n_groups, "groups of heads"
    if "1" in symbols:
        assert config.mamba1 is not None
        yield "model.mamba1.expand * model.d_model", config.mamba1.expand * config.d_model, "channels"
    if "*" in symbols:
        assert config.attention is not None
        yield "model.attention.n_kv_heads", config.attention.n_kv_heads, "key/value heads"
    if "-" in symbols:
        assert config.mlp is not None
        yield "model.mlp.d_ff", config.mlp.d_ff, "channels"
