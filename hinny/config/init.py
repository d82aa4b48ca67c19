"""The [init] section of a recipe: the run whose weights this one begins with."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from hinny.config.section import Positive, Section


class InitConfig(Section):
    """Training that goes on from another run's weights, at step 0, with a new optimiser and a schedule of its own."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: str | None = Field(default=None, alias="from")
    """The key `from`: a run directory. A shipped recipe leaves it open, and `hinny train RECIPE init.from=RUN` names
    it."""
    step: Positive | None = None
    """Step of the checkpoint; the newest without it."""
