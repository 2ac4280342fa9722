"""Keeps the LLM and the proxy of one run loaded between its jobs.

Only base models are kept, and strategies give them back as they came, so no result depends on what is cached: a
restarted worker computes the same bytes. One LLM and one proxy at a time; asking for another drops the one before.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from assets.errors import DeviceError, ModelFolderError
from assets.models import folder_identity, load_language_model
from cotuning.language_model import LanguageModel
from persistence.blobs import BlobStore
from protocol.assignments import ModelManifest
from protocol.errors import DomainError, ErrorCode
from protocol.runs import ModelLoading

_Identity = tuple[object, ...]


class ModelCache:
    """The loaded models of this process.

    Args:
        folder: For model folders that are put together from blobs and removed once loaded.
        blobs: Where the proxies' files are.
    """

    def __init__(self, folder: Path, blobs: BlobStore) -> None:
        self._folder = folder
        self._blobs = blobs
        self._llm: tuple[_Identity, LanguageModel] | None = None
        self._proxy: tuple[_Identity, LanguageModel] | None = None

    def llm(self, source: str, loading: ModelLoading | None = None) -> LanguageModel:
        """Return the model in the folder, or of the hub name, `source`.

        A folder whose files changed since they were loaded is loaded again.

        Raises:
            DomainError: MODEL_FOLDER_MISSING, there is no causal language model; INVALID_FIELD, it cannot be held as
                `loading` says.
        """
        loading = loading or ModelLoading()
        identity = (*folder_identity(source), loading.model_dump_json())
        if self._llm is None or self._llm[0] != identity:
            self._llm = self._proxy = None  # free the memory before it is needed again
            self._llm = (identity, load_model(source, loading))
        return self._llm[1]

    def proxy(self, manifest_sha256: str) -> LanguageModel:
        """Return the proxy whose manifest has this hash, as its files are in the blob store; next to the LLM."""
        identity = (manifest_sha256,)
        if self._proxy is None or self._proxy[0] != identity:
            self._proxy = None
            with self._materialised(manifest_sha256) as folder:
                self._proxy = (identity, load_model(str(folder)))
        if self._llm is not None:
            self._proxy[1].model.to(self._llm[1].device)
        return self._proxy[1]

    @contextmanager
    def _materialised(self, manifest_sha256: str) -> Iterator[Path]:
        with self._blobs.open(manifest_sha256) as file:
            manifest = ModelManifest.model_validate_json(file.read())
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="proxy-") as name:
            folder = Path(name)
            for each in manifest.files:
                with self._blobs.local(each.sha256) as source:
                    _link_or_copy(source, folder / each.path)
            yield folder


def load_model(source: str, loading: ModelLoading | None = None) -> LanguageModel:
    """Load a causal language model from a folder or by its hub name, in float32 on the CPU if not told otherwise.

    Raises:
        DomainError: MODEL_FOLDER_MISSING; INVALID_FIELD, `loading` cannot be done here.
    """
    loading = loading or ModelLoading()
    try:
        dtype = getattr(torch, loading.dtype)
        return load_language_model(source, dtype=dtype, four_bit=loading.four_bit, devices=loading.devices)
    except DeviceError as error:
        raise DomainError(ErrorCode.INVALID_FIELD, f"`llm_loading`: {error}", received=loading.model_dump()) from error
    except ModelFolderError as error:
        raise DomainError(ErrorCode.MODEL_FOLDER_MISSING, str(error), received=source) from error


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
