"""The store of files, content-addressed: a folder, or an S3-compatible object store. Both keep the same promises.

A file is in the store whole, durable and with the hash that is its name, or it is not in the store at all. Storing the
same content again changes nothing. Memory does not grow with a file.
"""

from persistence.blobs.address import S3Address, open_store, read_address
from persistence.blobs.folder import FolderBlobStore
from persistence.blobs.interface import BlobStore, BlobWriter, StagedChunk, StoredBlob, StoredObject

__all__ = [
    "BlobStore",
    "BlobWriter",
    "FolderBlobStore",
    "S3Address",
    "StagedChunk",
    "StoredBlob",
    "StoredObject",
    "open_store",
    "read_address",
]
