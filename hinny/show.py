"""The verb `show`: what a recipe is and costs, before anything is built. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hinny import counts, memory, predict
from hinny import pattern as patterns
from hinny.config import ModelConfig, Recipe
from hinny.memory.quantised import Kind, quantised_bytes
from hinny.memory.serving import kv_bytes, slot_bytes
from hinny.verb import make_callable

BATCH = 32
"""The batch of the paper's own prediction of generation speed, as far as is known."""
CONTEXTS = (4096, 16384, 32768, 131072)
PAGE = 64
"""Tokens of a page of keys, as an engine has them unless it is told otherwise."""
MFU = 0.3
"""Share of the peak FLOP/s assumed for prefill and training: the paper's 8B runs on H100 had 0.299 and 0.307. In
training it is of all that is executed, what is computed again included; an MFU counts the model's FLOPs alone."""

COLOURS = {"M": "cyan", "1": "blue", "*": "bold magenta", "-": "bright_black"}


def show(recipe: Recipe, *, hardware: str = "H100", batch: int = BATCH, contexts: Iterable[int] = CONTEXTS,
         mfu: float = MFU, devices: int | None = None) -> dict[str, Any]:
    """The figures of `recipe` as one JSON-able object.

    Sizes are exact; FLOPs are counted as hinny.counts documents; `memory` is arithmetic for `devices` of the named
    `hardware`, as many as [parallel] says if None (hinny.memory), `predictions` for parallel.tensor of them
    (hinny.predict), and both say where the model does not fit. `mfu` is the share of the peak FLOP/s at which prefill
    and training run: of training's model FLOPs and `recomputed_flops_per_token` together, so that `training_mfu`, of
    model FLOPs alone, is lower where there are such. Raises ConfigError for hardware that is not known, sizes that are
    not positive, a share that is not above 0 and at most 1, and devices that are not the product of [parallel]'s sizes.
    """
    model, device = recipe.model, predict.find_hardware(hardware)
    count, length = counts.parameters(model), recipe.train.pass_len
    training = memory.training(recipe, int(predict.USABLE * device.memory), devices)
    return {
        "name": recipe.name,
        "description": " ".join(recipe.description.split()),
        "parameters": count.total,
        "non_embedding": count.non_embedding,
        "parameters_by_part": {
            "embedding": count.embedding, "head": count.head, "norms": count.norms,
            **{patterns.SYMBOLS[symbol]: number for symbol, number in count.layers.items()}},
        "pattern": model.pattern,
        "layers": {patterns.SYMBOLS[symbol]: number for symbol, number in counts.layer_counts(model).items()},
        "allocation": _allocation(model),
        "flops_length": length,
        "flops_per_token": counts.training_flops(model, length),
        "flops_per_token_forward": counts.forward_flops(model, length),
        "flops_per_token_training": counts.training_flops(model, length),
        "recomputed_flops_per_token": counts.recomputed_flops(model, length, recipe.parallel),
        "training_tokens": recipe.train.steps * recipe.train.batch_size * recipe.train.seq_len,
        "state_bytes": counts.state_bytes(model),
        "kv_bytes_per_token": counts.kv_bytes_per_token(model),
        "memory": {"weights_bf16_bytes": counts.weight_bytes(model),
                   "weights_quantised_bytes": {kind: quantised_bytes(model, kind, 2) for kind in get_args(Kind)},
                   "training": training,
                   "serving": {"page_tokens": PAGE, "page_bytes": PAGE * kv_bytes(model),
                               "slot_bytes": slot_bytes(model)}},
        "predictions": _predictions(recipe, device, batch, list(contexts), mfu),
    }


def _allocation(model: ModelConfig) -> list[str]:
    """Megatron's log lines where the pattern came from ratios; an override shows only where it differs from them."""
    if model.n_layers is None:
        return []
    ratios = model.attention_ratio or 0.0, model.mlp_ratio or 0.0
    given = None if model.pattern == patterns.allocate(model.n_layers, *ratios) else model.pattern
    return patterns.describe(model.n_layers, *ratios, given)


def _predictions(recipe: Recipe, device: predict.Hardware, batch: int, contexts: list[int],
                 mfu: float) -> dict[str, Any]:
    model, tensor, length = recipe.model, recipe.parallel.tensor, recipe.train.pass_len
    calibration = predict.constants_of(device, tensor)
    speed = predict.training_speed(model, device, seq_len=length, mfu=mfu,
                                   recomputed=counts.recomputed_flops(model, length, recipe.parallel))
    return {
        "assumptions": {"hardware": device.name, "tensor": tensor, "source": "vendor's public data sheet",
                        "flops_bf16": device.flops, "bandwidth": device.bandwidth, "memory": device.memory,
                        "usable_memory": predict.USABLE, "mfu": mfu, "weights": "bf16",
                        "keys_and_values": "bf16", "states": "fp32",
                        "timed": device.name in predict.CALIBRATED,
                        "calibration": None if calibration is None else asdict(calibration)},
        "decode": [predict.decode(model, device, batch=batch, context=context, tensor=tensor,
                                  calibration=calibration) for context in contexts],
        "prefill": [predict.prefill(model, device, batch=1, context=context, mfu=mfu, tensor=tensor)
                    for context in contexts],
        "training_tokens_per_s_per_device": speed,
        "training_mfu": speed * counts.training_flops(model, length) / device.flops,
    }


def show_pattern(n_layers: int, attention_ratio: float, mlp_ratio: float,
                 override: str | None = None) -> dict[str, Any]:
    """An allocation of layers as one JSON-able object: the pattern, layers by kind, positions, Megatron's log."""
    pattern = patterns.resolve(n_layers, attention_ratio, mlp_ratio, override)
    layers = patterns.parse(pattern)
    return {
        "pattern": pattern,
        "layers": {patterns.SYMBOLS[symbol]: number for symbol, number in patterns.counts(pattern).items() if number},
        "attention_at": [i for i, symbol in enumerate(layers) if symbol == "*"],
        "allocation": patterns.describe(n_layers, attention_ratio, mlp_ratio, override),
    }


def render(figures: dict[str, Any], console: Console | None = None) -> str:
    """What `show` or `show_pattern` found, as text as wide as the terminal and coloured where it is one."""
    console = console or Console()
    with console.capture() as captured:
        console.print(_page(figures) if "predictions" in figures else _drawing(figures))
    return captured.get().rstrip("\n")


def render_rows(rows: list[dict[str, Any]]) -> str:
    """Rows of results (hinny.run.row) as a table as wide as the terminal; peers only where there are any."""
    table = Table(box=None, pad_edge=False)
    compared = any(r["peer"] or r["ratio"] is not None for r in rows)
    for name in ("what", "shape"):
        # a name that is cut off tells nothing
        table.add_column(name, overflow="fold")
    for name in ("value", "low", "high", *(("peer", "ratio") if compared else ())):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for r in rows:
        peer = f"{r['peer_value']:,.4g} {r['peer']}" if r["peer"] else ""
        numbers = ["" if r[name] is None else f"{r[name]:,.4g}" for name in ("value", "low", "high")]
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x"
        table.add_row(r["what"], r["shape"], *numbers, *((peer, ratio) if compared else ()), r["unit"])
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _drawing(figures: dict[str, Any]) -> Group:
    kinds = ", ".join(f"{number} {kind}" for kind, number in figures["layers"].items())
    drawing = [_coloured(line, ruler=i % 2 == 0) for i, line in enumerate(patterns.draw(figures["pattern"]))]
    return Group(*drawing, Text(kinds), *(Text(line, style="dim") for line in figures["allocation"]))


def _page(figures: dict[str, Any]) -> Group:
    sizes = Table.grid(padding=(0, 2))
    for label, value in _sizes(figures):
        sizes.add_row(Text(label, style="dim"), Text(value))
    return Group(
        Text(figures["name"], style="bold"), Text(figures["description"]), Text(),
        Padding(_drawing(figures), (0, 0, 1, 2)), Padding(sizes, (0, 0, 1, 2)),
        Padding(_prediction_table(figures["predictions"]), (0, 0, 0, 2)), Text(_note(figures), style="dim"))


def _sizes(figures: dict[str, Any]) -> list[tuple[str, str]]:
    training, serving = figures["memory"]["training"], figures["memory"]["serving"]
    quantised = figures["memory"]["weights_quantised_bytes"]
    needed = training["devices_needed"]
    fits = "fits" if training["fits"] else (
        f"does not fit; sharded over {needed} devices it would" if needed else
        "does not fit on any number of devices: lower train.micro_batch_size")
    return [
        ("parameters", f"{figures['parameters']:,}"),
        ("without embedding and head", f"{figures['non_embedding']:,}"),
        *((f"  {part}", f"{number:,}") for part, number in figures["parameters_by_part"].items() if number),
        ("FLOPs a token, training", f"{quantity(figures['flops_per_token_training'])}FLOP at length "
                                    f"{figures['flops_length']:,}"),
        *([("  computed again", f"{quantity(again)}FLOP")] if (again := figures["recomputed_flops_per_token"]) else []),
        ("FLOPs a token, forward", f"{quantity(figures['flops_per_token_forward'])}FLOP"),
        ("training tokens", f"{figures['training_tokens']:,}"),
        ("state of a sequence", _bytes(figures["state_bytes"], "fp32")),
        ("keys and values of a token", _bytes(figures["kv_bytes_per_token"], "bf16")),
        (f"a page of {serving['page_tokens']} tokens", _bytes(serving["page_bytes"], "bf16")),
        ("weights", f"{quantity(figures['memory']['weights_bf16_bytes'])}B, bf16; "
                    f"{quantity(quantised['int8'])}B in int8 or fp8, {quantity(quantised['int4'])}B in int4"),
        ("training memory", f"{quantity(training['memory_bytes'])}B a device, most at: {training['phase']}; {fits}"),
        *((f"  {part}", f"{quantity(size)}B") for part, size in training["parts"].items()),
    ]


def _bytes(value: int, dtype: str) -> str:
    return f"{quantity(value)}B, {dtype}" if value else "none"


def _prediction_table(predictions: dict[str, Any]) -> Table:
    batch, name = predictions["decode"][0]["batch"], predictions["assumptions"]["hardware"]
    several = "" if (tensor := predictions["assumptions"]["tensor"]) == 1 else f"{tensor} "
    table = Table(title=f"Predicted on {several}{name}, prefill of 1 and decode of {batch} sequences",
                  title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for heading in ("context", "prefill tok/s", "decode tok/s", "memory", "fits", "max batch"):
        table.add_column(heading, justify="right")
    for decode, prefill in zip(predictions["decode"], predictions["prefill"], strict=True):
        fits = "yes" if decode["fits"] else "only batch 1" if prefill["fits"] else "no"
        largest = "any" if decode["max_batch"] is None else f"{decode['max_batch']:,}"
        table.add_row(f"{decode['context']:,}", f"{prefill['tokens_per_s']:,.0f}", f"{decode['tokens_per_s']:,.0f}",
                      f"{quantity(decode['memory_bytes'])}B", fits, largest)
    return table


def _note(figures: dict[str, Any]) -> str:
    given = figures["predictions"]["assumptions"]
    speed, mfu = (figures["predictions"][key] for key in ("training_tokens_per_s_per_device", "training_mfu"))
    again = f", an MFU of {mfu:.1%} without what is computed again" if figures["recomputed_flops_per_token"] else ""
    return (f"Arithmetic, not measured: {quantity(given['flops_bf16'])}FLOP/s, {quantity(given['bandwidth'])}B/s, "
            f"{quantity(given['memory'])}B by the {given['source']}, {given['usable_memory']:.0%} of it usable. "
            f"A decode step reads weights, keys and values once and moves the states twice{_reached(given)}. Prefill "
            f"and training run at {100 * given['mfu']:.4g}% of the peak: training {speed:,.0f} tokens/s a "
            f"device{again}.")


def _reached(given: dict[str, Any]) -> str:
    """What decoding is predicted to reach."""
    if (found := given["calibration"]) is None:
        return ", at the data sheet's bandwidth: " + (
            "sums over several of this device were not timed" if given["timed"] else "this device was not timed")
    sums = f" and {found['sum'] * 1e6:.1f} µs a layer's sum over GPUs" if given["tensor"] > 1 else ""
    return (f", at {found['share']:.1%} of the bandwidth and with {found['layer'] * 1e6:.1f} µs more a layer, times "
            f"the root of the sequences{sums}, as was measured ({found['source']})")


def _coloured(line: str, *, ruler: bool) -> Text:
    if ruler:
        return Text(line, style="dim")
    text = Text()
    for symbol in line:
        text.append(symbol, style=COLOURS.get(symbol, ""))
    return text


def quantity(value: float) -> str:
    """Three digits and a decimal prefix: 52.3 M."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:g} "


make_callable(__name__, "hinny.show:show")
