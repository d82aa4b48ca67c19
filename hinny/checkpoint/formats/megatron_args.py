"""The options that a Megatron checkpoint was trained with, `args` in its files: data, and never trusted alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from hinny.checkpoint.formats.pickles import Inert
from hinny.errors import CheckpointError

MUST_BE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "M*-": {"num_experts": (None, 0), "mtp_num_layers": (None, 0),
            "apply_residual_connection_post_layernorm": (False,)},
    "*-": {"add_bias_linear": (False,)},
    "-": {"openai_gelu": (False,), "quick_geglu": (False,), "glu_linear_offset": (0.0,),
          "activation_func_clamp_value": (None,)},
    "*": {"add_qkv_bias": (False,), "multi_latent_attention": (False,), "qk_layernorm": (False,),
          "qk_l2_norm": (False,),
          "window_size": (None,), "attention_output_gate": (False,), "softmax_type": ("vanilla",),
          "no_rope_freq": (None,), "rotary_interleaved": (False,), "use_rope_scaling": (False,)},
}
"""Layers, any of which make them matter → options of Megatron that change the result and that hinny has not → their
values that leave the result alone."""

T = TypeVar("T", int, float, bool, str)


class Args:
    """The fields of `args`, asked for by name; `facts` collects what was not there."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.source = source
        # what equals numbers one by one is no option, and answers no question
        self.fields = {key: Inert() if isinstance(value, Tensor) else value for key, value in fields.items()}
        self.facts: dict[str, str] = {}

    def has(self, key: str) -> bool:
        """Whether the field is there and is not None."""
        return self.fields.get(key) is not None

    def need(self, key: str, kind: type[T]) -> T:
        """The field, which is there and must be of this type; a whole number may stand for a float."""
        value = self.fields[key]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.source}: args.{key} is {shown(value)}; it must be of type {kind.__name__}. "
                                  "Use the file as it was saved.")
        return value

    def get(self, key: str, default: T) -> T:
        """The field; where it is absent or None, Megatron's `default`, which is noted."""
        if self.has(key):
            return self.need(key, type(default))
        self.facts[f"args.{key}"] = f"not there; Megatron's default, {default!r}, was taken"
        return default

    def agree(self, key: str, found: object, where: str) -> None:
        """Refuse a field that contradicts what the tensors show."""
        if self.has(key) and self.fields[key] != found:
            raise CheckpointError(
                f"{self.source}: args.{key} is {shown(self.fields[key])}, but {where} says {found!r}. One of them is "
                "not of this checkpoint; use the files as they were saved together.")

    def must_be(self, pattern: str) -> None:
        """Refuse options that hinny has not, as far as layers of `pattern` heed them."""
        table = {key: allowed for layers, options in MUST_BE.items() if set(layers) & set(pattern)
                 for key, allowed in options.items()}
        for key, allowed in table.items():
            if key in self.fields and self.fields[key] not in allowed:
                raise CheckpointError(f"{self.source}: args.{key} is {shown(self.fields[key])}; hinny can only compute "
                                      f"{' or '.join(map(repr, allowed))} exactly.")
        if absent := [key for key in table if key not in self.fields]:
            self.facts["options that args lacks"] = f"taken as off: {', '.join(absent)}"


def shown(value: object) -> str:
    """`value` for an error; what is not plain by its type alone, since a pickle can hold what prints without end."""
    return repr(value) if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"
