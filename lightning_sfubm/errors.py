"""Errors a user is meant to read: one sentence that names the file, line, key or shape and the way out.

The command line prints these without a traceback and exits with code 2. Anything else is a defect.
"""


class SFUBMError(ValueError):
    """Base of all errors caused by input, configuration or environment rather than by a defect."""


class DataError(SFUBMError):
    """A data file or domain cannot be used as it is."""


class ConfigError(SFUBMError):
    """A setting is unknown, out of range or inconsistent with another one."""


class AssetError(SFUBMError):
    """A model or data set could not be had from a folder, the package index or a hub."""


class CheckpointError(SFUBMError):
    """A checkpoint is torn, unsafe, or belongs to another model."""


class MessageError(SFUBMError):
    """A federated message does not follow the schema; it is refused whole."""


class PrivacyError(SFUBMError):
    """A privacy requirement is not met; the operation is refused (fail closed)."""
