"""What hinny raises when the user, the machine or the data is at fault.

    HinnyError              every message names what was found, what is allowed and what to do
    ├── ConfigError         a recipe, study, override or command-line value
    ├── DataError           text, shards, tokenizer
    ├── CheckpointError     a checkpoint that is missing, damaged, of another recipe, or could not be written
    ├── RunError            a run directory: absent, in use, incomplete
    ├── BackendError        a path asked for by name that cannot run here
    ├── TrainingError       a run that must stop: the loss is not a number
    └── RequestError        a generation or scoring request that cannot be served

Faults of hinny itself are assertions, not these.
"""


class HinnyError(Exception):
    """Base of every error that is not hinny's own fault; the command line prints its text alone."""


class ConfigError(HinnyError):
    """A recipe, study, override or command-line value that cannot be used."""


class DataError(HinnyError):
    """Text, shards or a tokenizer that cannot be used."""


class CheckpointError(HinnyError):
    """A checkpoint that is missing, damaged, of another recipe, or could not be written."""


class RunError(HinnyError):
    """A run directory that is absent, in use, or incomplete."""


class BackendError(HinnyError):
    """A path asked for by name that cannot run on this machine."""


class TrainingError(HinnyError):
    """Training that must stop, for instance a loss that is not a number."""


class RequestError(HinnyError):
    """A generation or scoring request that cannot be served."""
