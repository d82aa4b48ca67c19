"""Extensions in a study: which trained models go on with longer sequences, by which methods, as which command lines.

An extension keeps the tokens of a step and the data of its base; what its method changes is written in `overrides`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from hinny.config import Recipe, Section, apply_override, validate
from hinny.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]


SET = ("train.seq_len", "train.seed", "train.batch_size", "train.micro_batch_size", "data.path")
"""Keys that the study sets for each extension."""


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class ExtensionConfig(Section):
    """What all extensions of a study share."""

    steps: Positive
    lr_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """First learning rate as a share of the base's; the paper's extensions began with a tenth."""
    warmup_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the samples over which the rate rises."""


class ExtendConfig(Section):
    """One method: what it changes, in which recipes, by how many times they are extended."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    recipes: Annotated[list[str], Field(min_length=1)]
    """Names of recipes of the study."""
    factors: Annotated[list[Annotated[int, Field(gt=1)]], Field(min_length=1)]
    """Lengths, as multiples of the base's train.seq_len."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys that differ from the base; "{length}", "{base_length}" and "{factor}" in a value are replaced, and
    "null" takes a key out."""

    @model_validator(mode="after")
    def _check(self) -> ExtendConfig:
        for key in self.changed:
            if key in SET or key.startswith("init."):
                raise ValueError(f"overrides may not set {key}: the study sets it for each extension.")
        return self

    @property
    def changed(self) -> dict[str, Any]:
        """The overrides as one table of dotted keys."""
        return flatten(self.overrides)


@dataclass(frozen=True)
class Extension:
    """One training that goes on from a run of the study: recipe, method and factor, for every seed."""

    base: Recipe
    method: str
    factor: int
    overrides: tuple[str, ...]
    """`key=value` beyond its base."""
    changes: tuple[str, ...] = ()
    """Keys of them that are the method's own; what else differs, the study sets for every extension."""

    @property
    def length(self) -> int:
        """Tokens of its sequences."""
        return self.base.train.seq_len * self.factor

    @property
    def shape(self) -> str:
        """What its rows say of it."""
        return f"method={self.method} factor={self.factor}"

    def folder(self, seed: int) -> str:
        """Name of its run's folder."""
        return f"{self.base.name}-s{seed}-{self.method}-{self.factor}x"


def extensions(methods: Iterable[ExtendConfig], shared: ExtensionConfig | None,
               recipes: dict[str, Recipe]) -> list[Extension]:
    """Every extension of a study, in the order of its methods. Raises ConfigError for one that cannot be made."""
    found = [Extension(_recipe(name, method, recipes), method.name, factor,
                       tuple(_overrides(method, _known(shared), recipes[name], factor)), tuple(method.changed))
             for method in methods for name in method.recipes for factor in method.factors]
    folders = [extension.folder(0) for extension in found]
    if twice := next((name for name in folders if folders.count(name) > 1), None):
        raise ConfigError(f"two extensions would write {twice}; give one of the methods another name.")
    return found


def resolved(extension: Extension) -> Recipe:
    """The recipe that the extension trains, but for seed and base."""
    table = extension.base.model_dump(mode="json", exclude_none=True, by_alias=True)
    for item in extension.overrides:
        apply_override(table, item)
    return validate(Recipe, table, f"{extension.base.name}, extended by {extension.method!r}")


def _known(shared: ExtensionConfig | None) -> ExtensionConfig:
    if shared is None:
        raise ConfigError("the study has [[extend]] and no section [extension], which tells how long extensions train; "
                          "add it, with steps.")
    return shared


def _recipe(name: str, method: ExtendConfig, recipes: dict[str, Recipe]) -> Recipe:
    if name not in recipes:
        raise ConfigError(f"extend {method.name!r} names the recipe {name!r}, which the study does not; it has "
                          f"{', '.join(recipes)}.")
    return recipes[name]


def _overrides(method: ExtendConfig, shared: ExtensionConfig, base: Recipe, factor: int) -> Iterator[str]:
    train, optim = base.train, base.optim
    length, batch = train.seq_len * factor, max(1, train.batch_size // factor)
    if train.batch_size % factor:
        raise ConfigError(f"extend {method.name!r}: {base.name} has batches of {train.batch_size} sequences, which "
                          f"{factor} does not divide, so that a step would not keep its tokens; choose factors that "
                          "divide train.batch_size.")
    lr = float(f"{optim.lr * shared.lr_share:.6g}")
    own = {"train.seq_len": length, "train.batch_size": batch,
           "train.micro_batch_size": max(1, train.micro_batch_size // factor), "train.steps": shared.steps,
           "train.save_every": shared.steps, "optim.lr": lr,
           **({} if optim.min_lr is None else {"optim.min_lr": float(f"{optim.min_lr * shared.lr_share:.6g}")}),
           "optim.warmup_samples": round(shared.warmup_share * shared.steps * batch)}
    for key, value in {**own, **method.changed}.items():
        yield f"{key}={_text(value, length=length, base_length=train.seq_len, factor=factor)}"


def _text(value: Any, **numbers: int) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str):
        for name, number in numbers.items():
            value = value.replace(f"{{{name}}}", str(number))
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
