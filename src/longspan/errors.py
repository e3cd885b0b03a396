"""Errors that longspan raises on purpose.

Holds exception types. Must not know anything else of the package.
Read next: `longspan.types`.
"""


class LongspanError(Exception):
    """Base of every error that longspan raises on purpose."""


class ConfigError(LongspanError, ValueError):
    """The user asked for something that cannot be done.

    The message is one line that names the field, the value received and the legal values.
    """


class UnsupportedModelError(ConfigError):
    """The model, or an option of it, is not proven exact and is therefore refused at load."""


class CapacityError(ConfigError):
    """A request needs more KV pages than the ranks that it may use can hold together."""


class CommunicationError(LongspanError):
    """A peer did not answer in time, or is gone. Names the rank, the operation and the peer."""


class WorkerError(LongspanError):
    """A worker process died or raised. Names the rank and the reason."""
