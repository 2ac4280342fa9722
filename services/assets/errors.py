"""What can be wrong with a file or folder that a user named.

AssetError
├── ModelFolderError   a model folder that is missing, incomplete or not a causal language model
├── DataFileError      a data file that is missing, or a row in it that cannot be read
├── TensorFileError    bytes that are not a safetensors file
├── VocabularyError    a tokenizer that cannot travel, or bytes that are none
└── DeviceError        what a device was asked for, it or its software cannot do
"""


class AssetError(ValueError):
    """Base of this package's errors. The message names the path, what was expected and what was found."""


class ModelFolderError(AssetError):
    """The folder or hub name does not give a causal language model."""


class DataFileError(AssetError):
    """A data file that cannot be read; `path:line` comes first in the message where there is a line."""


class TensorFileError(AssetError):
    """The bytes are not a well-formed safetensors file."""


class VocabularyError(AssetError):
    """The tokenizer cannot be written so that another party reads with it as its owner does, or cannot be read."""


class DeviceError(AssetError):
    """The device, or the software for it, is not what the settings need."""


def is_panic(error: BaseException) -> bool:
    """Say whether an error is a panic of a library in Rust: it derives from `BaseException`, so nothing catches it."""
    return type(error).__name__ == "PanicException"
