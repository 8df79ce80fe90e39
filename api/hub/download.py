"""Downloads a file over HTTP, continues a partial file, and checks its hash."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from api.hub.errors import HubError, hub_errors

_HASH_CHUNK_BYTES = 2**20
# Suffix of a partial file, which huggingface_hub's cache commands recognize.
PARTIAL_SUFFIX = ".incomplete"
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class RemoteFile(NamedTuple):
    """A file to download."""

    name: str
    """Name in messages and of the progress bar."""
    url: str
    size: int | None
    """Bytes of the file. None if the server sends no size."""
    etag: str
    """SHA-256 of the file, its git hash, or any text that changes with the file; empty if the server has none."""


def download(file: RemoteFile, target: Path, headers: Mapping[str, str], locks: Path) -> None:
    """Downloads `file` to `target`, which is created as a whole at the end. Does nothing if `target` exists.

    Continues a partial file with the same etag in the same folder, for example after a broken connection. `locks` is
    the folder of a lock that keeps other processes from the same download. Raises HubError; the partial file then
    stays, except after a wrong hash.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    tagged = hashlib.sha256(f"{target}\n{file.etag}".encode()).hexdigest()[:16]
    partial = target.with_name(f"{target.name}.{tagged}{PARTIAL_SUFFIX}")
    with hub_errors(file.name, token="authorization" in {key.lower() for key in headers}):
        locks.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{tagged}.lock"):
            if target.exists():
                return
            with partial.open("ab") as out:
                if not file.etag or (file.size is not None and out.tell() > file.size):
                    out.truncate(0)
                http_get(
                    file.url,
                    out,
                    resume_size=out.tell(),
                    headers={**headers, "Accept-Encoding": "identity"},
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            check_hash(partial, file)
            os.replace(partial, target)


def check_hash(path: Path, file: RemoteFile) -> None:
    """Removes `path` and raises HubError if the etag of `file` is a hash and is not the hash of `path`."""
    if _SHA256.fullmatch(file.etag):
        found = _digest(path, hashlib.sha256())
    elif _GIT_SHA1.fullmatch(file.etag):
        found = _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))
    else:
        return
    if found != file.etag:
        path.unlink()
        raise HubError(f"{file.name} was damaged in transfer and is removed: its hash is {found}, not {file.etag}")


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as source:
        while chunk := source.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def check_space(name: str, folder: Path, sizes: Iterable[int | None], present: int = 0) -> None:
    """Raises HubError if the disk of `folder` has too few free bytes for `sizes` without the `present` bytes on it."""
    needed = sum(size or 0 for size in sizes) - present
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{name} needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; paceline models rm NAME "
            "frees space, and HF_HUB_CACHE names another folder"
        )
