"""Megatron-LM checkpoints: hybrids with Mamba-2 and GPTs, of every era since the paper's release, in and out.

Read are torch files of any tensor and pipeline ranks (hinny.checkpoint.formats.megatron_shards) and distributed
checkpoints (megatron_dcp). The era is told by names (megatron_names), the architecture by shapes and args
(megatron_settings). Written are torch files (megatron_write).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hinny.checkpoint.formats.files import listed, tokenizer_files
from hinny.checkpoint.formats.foreign import LONGEST, Foreign
from hinny.checkpoint.formats.megatron_args import Args
from hinny.checkpoint.formats.megatron_dcp import Distributed, is_distributed
from hinny.checkpoint.formats.megatron_names import Names, detect, rows, variants
from hinny.checkpoint.formats.megatron_settings import Sizes, infer_model, infer_pattern
from hinny.checkpoint.formats.megatron_shards import FILE, TRACKER, Shards, iteration_folder, open_shards
from hinny.checkpoint.formats.megatron_write import names_of, refusals, write_checkpoint
from hinny.errors import CheckpointError, DataError
from hinny.tokenizer import load as load_tokenizer

NAME = "megatron"

ADDS_TOKENS = "SentencePieceTokenizer"
"""The kind of tokenizer to which Megatron adds tokens that its file does not count."""

UNTIED = "untie_embeddings_and_output_weights"

__all__ = ["NAME", "names_of", "open_checkpoint", "recognises", "refusals", "rows", "write_checkpoint"]


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint of Megatron's: its tracker file, or the files of an iteration."""
    try:
        return ((folder / TRACKER).is_file() or any(folder.glob(f"mp_rank_*/{FILE}"))
                or (is_distributed(folder) and (folder / "common.pt").is_file()))
    except OSError:
        return False


def open_checkpoint(folder: Path) -> Foreign:
    """The checkpoint in `folder`: its root, with the tracker file, or the folder of one iteration.

    Raises CheckpointError for files that are missing, damaged or do not belong together, for more than data in a file,
    and for an architecture that hinny has not.
    """
    iteration = iteration_folder(folder)
    try:
        stored = Distributed(iteration) if is_distributed(iteration) else open_shards(iteration)
    except OSError as fault:
        raise CheckpointError(f"{iteration} cannot be read: {fault.strerror}.") from None
    names = detect(stored.infos, parts=isinstance(stored, Distributed))
    if names is None:
        raise CheckpointError(f"{iteration} has no layers by Megatron's names (decoder.layers.0 …); it holds "
                              f"{listed(sorted(stored.infos))}.")
    args, ranks = stored.args, stored.ranks if isinstance(stored, Shards) else 1
    sizes = Sizes({name: info.shape for name, info in stored.infos.items()}, ranks)
    tied, twins = _tied(names, stored, args)
    tokenizer = tokenizer_files(folder) or tokenizer_files(iteration)
    pattern = infer_pattern(stored.infos, names.whole)
    model = infer_model(pattern, names, sizes, args, lambda rows: _vocab_size(rows, tokenizer, args), tied)
    table = rows(model, names)
    ignored = dict.fromkeys(twins, "a copy of the embedding, to which it is tied")
    facts = {"iteration": iteration.name, **_longest(args)}
    if isinstance(stored, Shards):
        stored.merging(table, twins)
        ignored |= dict.fromkeys(stored.extra_states, "no weights: scales of Transformer Engine, or nothing")
        facts["files"] = f"{ranks} tensor-parallel ranks, {len(stored.files)} pipeline stages"
        facts["extra states dropped"] = str(len(stored.extra_states))
    else:
        counts = Counter(stored.ignored.values())
        facts["files"] = f"distributed, {len(stored.stored)} tensors"
        facts["extra states dropped"] = str(counts["extra"])
        facts["not read"] = f"{counts['optimizer']} of the optimiser, {counts['run']} of random numbers"
    padding = stored.infos[names.embedding].shape[0] - model.vocab_size
    return Foreign(
        format=f"Megatron {'GPT' if names.whole else 'hybrid'}, {names.era}", model=model, tensors=stored, rows=table,
        ignored=ignored, tokenizer=tokenizer, variants=variants(names, model, stored.infos),
        facts={**facts, "rows of vocabulary padding dropped": str(padding), **args.facts})


def _tied(names: Names, stored: Shards | Distributed, args: Args) -> tuple[bool, dict[str, str]]:
    """Whether the head is the embedding, and what then only repeats it: the last pipeline stage has a copy."""
    there = names.head in stored.infos
    copies = [name for name in (names.head, "word_embeddings_for_head.weight") if name in stored.infos]
    untied = there
    if args.has(UNTIED):
        untied = args.need(UNTIED, bool)
    else:
        args.facts[f"args.{UNTIED}"] = f"not there; the head is {'there' if there else 'not there'}"
    if untied and not there:
        raise CheckpointError(f"{args.source}: args.{UNTIED} is True, but there is no "
                              f"{names.head}. The file of the last pipeline stage is missing or damaged.")
    if untied:
        return False, {}
    if copies and (not isinstance(stored, Shards) or len(stored.files) == 1):
        raise CheckpointError(f"{args.source}: args.{UNTIED} is False, but there is "
                              f"{copies[0]} in one pipeline stage. One of them is not of this checkpoint.")
    return True, dict.fromkeys(copies, names.embedding)


def _longest(args: Args) -> dict[str, str]:
    """The fact of the longest sequence, where args tell one."""
    found = (args.need(key, int) for key in ("max_position_embeddings", "seq_length") if args.has(key))
    return {LONGEST: str(length)} if (length := next(found, 0)) > 0 else {}


def _vocab_size(stored: int, tokenizer: tuple[Path, ...], args: Args) -> int:
    """Words of the vocabulary, of `stored` rows: Megatron pads it, to share it among ranks."""
    kind = args.fields.get("tokenizer_type")
    if args.fields.get("vocab_size") == args.fields.get("padded_vocab_size") == stored:
        return stored
    if tokenizer and kind != ADDS_TOKENS:
        try:
            words = load_tokenizer(tokenizer[0]).vocab_size
        except DataError as fault:
            raise CheckpointError(f"{fault} It tells the size of the vocabulary; remove it to go without.") from None
        where = str(tokenizer[0])
    elif args.has("vocab_size") and not tokenizer:
        # the option counts the words before the end of a document
        words = args.need("vocab_size", int) + (kind == "NullTokenizer")
        where = f"{args.source}: args.vocab_size"
    else:
        args.facts["vocabulary"] = f"all {stored} rows: no file tells how many of them are padding"
        return stored
    if not 0 < words <= stored:
        raise CheckpointError(f"{where} has {words} words, but the embedding has {stored} rows. The tokenizer is not "
                              "of this checkpoint.")
    return words

