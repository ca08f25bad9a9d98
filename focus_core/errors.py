"""Define every error that focusllm raises on purpose.

    FocusError
    ├── ConfigError          (also ValueError)         a setting is out of its bounds
    ├── CorpusError                                    a document cannot be read
    │   ├── DocumentNotFoundError (also FileNotFoundError)
    │   ├── NotTextError                               the file holds bytes that are not text
    │   └── EmptyCorpusError                           nothing to read was found
    ├── BaseModelError                                 base weights cannot be found or used
    │   └── UnsupportedModelError                      the family, or a feature of it, is not supported
    ├── AdapterError                                   candidate projections are missing or do not fit
    │   └── AdapterMismatchError                       the adapter belongs to another base
    ├── ContextTooLongError                            the local context does not fit the window
    ├── StoreError                                     stored chunk KV is damaged or of other weights
    ├── OutOfMemoryError     (also MemoryError)        not even one chunk fits
    ├── RankError                                      another process of a shared memory is gone
    └── CancelledError                                 the caller asked to stop

Foreign errors are translated at the border only. Every message says what happened, the value, and what to do next.
This module holds no logic and imports nothing.
"""


class FocusError(Exception):
    """Root of all errors raised on purpose by focusllm."""


class ConfigError(FocusError, ValueError):
    """A setting is out of its bounds."""


class CorpusError(FocusError):
    """A document cannot be read."""


class DocumentNotFoundError(CorpusError, FileNotFoundError):
    """A path does not exist."""


class NotTextError(CorpusError):
    """A file holds bytes that are not text."""


class EmptyCorpusError(CorpusError):
    """No text was found where some was asked for."""


class BaseModelError(FocusError):
    """Base weights cannot be found, read or used."""


class UnsupportedModelError(BaseModelError):
    """The decoder family, or a feature of it, is not supported."""


class AdapterError(FocusError):
    """Candidate projections are missing, unreadable or do not fit."""


class AdapterMismatchError(AdapterError):
    """The adapter was trained for another base."""


class ContextTooLongError(FocusError):
    """The local context does not fit the window."""


class StoreError(FocusError):
    """Stored chunk KV is damaged, or was made by other weights."""


class OutOfMemoryError(FocusError, MemoryError):
    """Not even the smallest batch fits in memory."""


class RankError(FocusError):
    """Another of the processes that share a memory's chunks is gone."""


class CancelledError(FocusError):
    """The caller asked to stop; nothing was changed."""
