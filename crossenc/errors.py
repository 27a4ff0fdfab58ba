"""Every error that crossenc raises on purpose, for a caller who wants to catch one kind.

CrossEncError
├── InputError             what the user pointed at cannot be used: a file, a column, a value
│   └── ConfigError        a setting is unknown, of the wrong type or contradicts another
├── CheckpointError        a model folder is incomplete, damaged or unsafe to load
├── ScoreError             a model produced something that is not a finite score
├── StorageError           a store refused, failed for longer than the retry limit, or is full
└── RunConflictError       an output belongs to another run: another writer, or other inputs and options

Each message says what is wrong and what to do next. Messages never hold credentials.
"""


class CrossEncError(Exception):
    """Base of the tree; catching it catches everything raised on purpose."""


class InputError(CrossEncError, ValueError):
    """A file, column or value given by the user cannot be used."""


class ConfigError(InputError):
    """A setting is unknown, has the wrong type or contradicts another setting."""


class CheckpointError(CrossEncError, ValueError):
    """A checkpoint is incomplete, damaged or unsafe to load."""


class ScoreError(CrossEncError, ValueError):
    """A score is NaN or infinite where a finite number is needed."""


class StorageError(CrossEncError, OSError):
    """A store refused an operation, kept failing until the deadline, or has no space left."""


class RunConflictError(CrossEncError, RuntimeError):
    """An output folder belongs to another run than the one that was asked for."""
