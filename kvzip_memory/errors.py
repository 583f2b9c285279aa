"""Every error this package raises on purpose. Each message names the value, the limit and the way out."""


class KVzipError(Exception):
    """Base of all errors raised by ``kvzip_memory``."""


class InputError(KVzipError, ValueError):
    """An argument or a source that cannot be used; nothing was computed, written or changed."""


class WindowError(InputError):
    """Text that does not fit into the model's window.

    Attributes:
        tokens: how many tokens were asked for.
        window: how many tokens the model can hold.
    """

    def __init__(self, message: str, *, tokens: int, window: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.window = window


class BudgetError(KVzipError, RuntimeError):
    """A context that does not fit into its tier's byte budget, or not while others use all of it."""


class UnsupportedModelError(KVzipError, ValueError):
    """A model whose cache cannot be compressed by dropping key-value pairs."""


class ModelError(KVzipError, RuntimeError):
    """The model computed numbers that are not finite, by which nothing can be ranked or sampled; it is in training; or a scorer, allocator
    or refit gave something else than it owes."""


class SessionBusyError(KVzipError, RuntimeError):
    """A session was asked while it is still answering."""


class QueueFullError(KVzipError, RuntimeError):
    """More answers were asked for at one time than may wait."""


class NotPicklableError(KVzipError, TypeError):
    """An object that cannot be pickled, or sent to another process."""


class StorageError(KVzipError, OSError):
    """What lies in ``cache_dir`` cannot be changed now: another process holds its index, or the disk refuses."""


class ForkedError(KVzipError, RuntimeError):
    """An engine, or what belongs to one, that was made before the process was forked."""


class CorruptFileError(KVzipError, ValueError):
    """A stored context that is damaged, incomplete or not one of our files."""


class IdentityMismatchError(KVzipError, ValueError):
    """A stored context that belongs to another model, tokenizer or format.

    Attributes:
        fields: the identity fields that differ.
    """

    def __init__(self, message: str, *, fields: tuple[str, ...]) -> None:
        super().__init__(message)
        self.fields = fields


class UnfinishedError(KVzipError, RuntimeError):
    """An answer that was cut before its JSON or its tool call was complete."""
