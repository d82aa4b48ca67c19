"""The [data] section of a recipe: which tokens, in which order, packed how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hinny.config.section import Positive, Section

Weight = Annotated[float, Field(gt=0.0)]


class SyntheticConfig(Section):
    """Sequences of practice mixed into the training stream (hinny.data.synthetic)."""

    share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the sequences of the stream, spread evenly over it; for none, leave the section out."""
    tasks: dict[Literal["phonebook", "copy", "mqar", "choice"], Weight]
    """Task → weight among the synthetic sequences."""
    phonebook_digits: Literal[4, 7, 10] = 10
    """Digits of a phone number: NNNN, EEE-NNNN or the paper's AAA-EEE-NNNN."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticConfig:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one of phonebook, copy, mqar, choice.")
        return self


class LongConfig(Section):
    """Long documents, shown more often than others (hinny.data.layout)."""

    min_tokens: Positive
    """Documents of so many tokens or more are long."""
    weight: Annotated[float, Field(gt=1.0)]
    """How often an epoch shows them: n of them come floor(n · weight) times."""


class DataConfig(Section):
    """Where tokens come from, their order, and how they are packed."""

    path: str | None = None
    """A folder made by `hinny prepare`; `hinny train --data DIR` sets it."""
    blend: dict[str, Weight] | None = None
    """In place of path: folder → weight. Sequences come from each folder in proportion to its weight."""
    order: Literal["windows", "megatron", "megatron-ssm"] = "windows"
    """windows: ours (hinny.data.mix). megatron: Megatron Core's own indices (hinny.data.megatron). megatron-ssm: those
    of the branch that the paper's models came from; another number of samples is asked of the folders of a blend."""
    boundaries: Literal["reset", "leak"]
    """reset: no layer sees across a document's edge. leak: packed documents see each other, as in the paper's runs."""
    eod_mask_loss: bool = False
    """Megatron's option of that name: what follows an end-of-document token is not learned. For boundaries = "leak"."""
    join: Literal["order", "source", "random"] = "order"
    """Which documents are neighbours with order = "windows". order: as in the folder. source: those of one source are
    adjacent, for a folder made with --source-field. random: in a seeded order anew each epoch."""
    long: LongConfig | None = None
    """Long documents are shown more often, with order = "windows"; each document once an epoch without it."""
    synthetic: SyntheticConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.blend is not None and self.path is not None:
            raise ValueError(f"path ({self.path!r}) and blend ({len(self.blend)} folders) both name the data; "
                             "remove one of them.")
        if self.blend is not None and len(self.blend) < 2:
            raise ValueError(f"blend has {len(self.blend)} folders, it needs two or more; name a single one as path.")
        if self.order != "windows" and self.synthetic is not None:
            raise ValueError(f'order = "{self.order}" is exactly Megatron\'s, which has no synthetic sequences; remove '
                             '[data.synthetic] or set order = "windows".')
        if self.order != "windows" and (self.join != "order" or self.long is not None):
            key = "long" if self.join == "order" else f'join = "{self.join}"'
            raise ValueError(f'{key} has no place in order = "{self.order}", which is exactly Megatron\'s; remove it '
                             'or set order = "windows".')
        if self.eod_mask_loss and self.boundaries == "reset":
            raise ValueError('eod_mask_loss has no effect with boundaries = "reset", which never learns how the next '
                             'document begins; remove it or set boundaries = "leak".')
        return self

    @property
    def folders(self) -> dict[str, float]:
        """Every folder of data with its weight, in the recipe's order; none if none is named."""
        if self.blend is not None:
            return dict(self.blend)
        return {} if self.path is None else {self.path: 1.0}

    def only(self, folder: str) -> DataConfig:
        """The same section for one of its folders alone."""
        return self.model_copy(update={"path": folder, "blend": None})
