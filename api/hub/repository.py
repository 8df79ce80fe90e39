"""Files of a repository, on the hub or in the cache of `huggingface_hub`, and their download."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct

from api.config.hub import HubConfig
from api.http.decode_errors import nearest_hint
from api.hub.download import PARTIAL_SUFFIX, RemoteFile, check_space, download
from api.hub.errors import HubError, hub_errors
from api.hub.gguf_names import (
    choose_head,
    choose_model,
    choose_projector,
    files_of,
    missing_parts,
    parse_gguf_name,
    quants_of,
    split_repository,
)

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

# Maximum seconds until the server replies to a request for metadata.
REPLY_SECONDS = 15.0
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Hub(Struct, frozen=True):
    """A server of model repositories, and the folder that caches their files."""

    endpoint: str
    folder: Path
    token: str = ""
    offline: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of requests to the hub, with the given or the saved token."""
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self.token or None, library_name="paceline")


class Repository(NamedTuple):
    """A revision of a repository."""

    name: str
    commit: str
    """Empty in the cache."""
    files: Mapping[str, RemoteFile | Path]
    """Files by path: to download, or cached."""


def hub_of(config: HubConfig) -> Hub:
    """Returns the hub. LLAMA_CACHE and MODEL_ENDPOINT, llama-server's variables, override those of huggingface_hub."""
    from huggingface_hub import constants

    return Hub(
        endpoint=(os.environ.get("MODEL_ENDPOINT") or constants.ENDPOINT).rstrip("/"),
        folder=Path(os.environ.get("LLAMA_CACHE") or constants.HF_HUB_CACHE).expanduser(),
        token=config.token,
        offline=config.offline or constants.HF_HUB_OFFLINE,
    )


def fetch_model(hub: Hub, name: str, file: str, note: Callable[[str], None]) -> Path:
    """Returns the first or only file of a model after all its files are in the cache.

    `name` is `user/model[:quant]`; a `file` replaces the choice by quantization. If the hub cannot be read, cached
    files are used. `note` receives a line about a download, and about the use of cached files. Raises HubError.
    """
    repository, quant = split_repository(name)
    cached = _cached_repository(hub, repository)
    if hub.offline:
        if not cached.files:
            raise HubError(f"{repository} is not in the cache {hub.folder}, and --offline forbids the download")
        return _cached_model(cached, quant, file)
    try:
        remote = _remote_repository(hub, repository)
        return _download_model(hub, remote, _model_paths(remote, quant, file), note)
    except HubError as error:
        try:
            path = _cached_model(cached, quant, file)
        except HubError:
            raise error from None
        note(f"{error}. The cached {path.name} is used.")
        return path


def find_projector(hub: Hub, name: str) -> str:
    """Returns the path of the projector in a repository, or among its cached files if the hub cannot be read; empty if
    there is none. `name` is `user/model[:quant]`."""
    repository, quant = split_repository(name)
    return choose_projector(_known_files(hub, repository), quant) or ""


def find_head(hub: Hub, name: str, file: str) -> str:
    """Returns the path of the file with MTP layers for the model `file` of a repository, or for the one that
    `fetch_model` chooses if `file` is empty; empty if there is none. See `find_projector`."""
    repository, quant = split_repository(name)
    files = _known_files(hub, repository)
    return choose_head(files, file or choose_model(files, quant) or "", quant) or ""


def _known_files(hub: Hub, repository: str) -> Mapping[str, RemoteFile | Path]:
    """Returns the files on the hub, or the cached ones if the hub cannot be read."""
    try:
        return (_cached_repository if hub.offline else _remote_repository)(hub, repository).files
    except HubError:
        return _cached_repository(hub, repository).files


class _LargeFile(Struct):
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _ListedFile(Struct, rename="camel"):
    rfilename: str
    size: Annotated[int, Meta(ge=0)] | None = None
    blob_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")] | None = None
    lfs: _LargeFile | None = None


class _Listing(Struct):
    """The hub's reply about a repository. Hashes are checked because they name files in the cache."""

    sha: Annotated[str, Meta(pattern=r"^[\w-]{1,64}\Z")]
    siblings: tuple[_ListedFile, ...] = ()


def _remote_repository(hub: Hub, name: str) -> Repository:
    """Returns the newest revision on the hub, without files whose names are no paths in it. Raises HubError."""
    from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

    with hub_errors(name, token="authorization" in hub.headers):
        validate_repo_id(name)
        reply = get_session().get(
            f"{hub.endpoint}/api/models/{name}", params={"blobs": True}, headers=hub.headers, timeout=REPLY_SECONDS
        )
        hf_raise_for_status(reply)
    try:
        listing = msgspec.json.decode(reply.content, type=_Listing)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HubError(f"{name}: {hub.endpoint} replied with something other than a list of files: {error}") from None
    files: dict[str, RemoteFile | Path] = {}
    for file in listing.siblings:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or _CONTROL_CHARACTER.search(file.rfilename):
            continue
        url = f"{hub.endpoint}/{name}/resolve/{listing.sha}/{quote(file.rfilename)}"
        etag = file.lfs.sha256 if file.lfs else file.blob_id or ""
        files[file.rfilename] = RemoteFile(file.rfilename, url, file.size, etag)
    return Repository(name, listing.sha, files)


def scan_cache(hub: Hub) -> HFCacheInfo | None:
    """Returns the contents of the cache; None if the folder does not exist."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(hub.folder)
    except (CacheNotFound, ValueError):
        return None


def _cached_repository(hub: Hub, name: str) -> Repository:
    """Returns the repository's files in the cache. A file of the branch `main` precedes those of other revisions."""
    cache = scan_cache(hub)
    repos = cache.repos if cache is not None else ()
    revisions = [revision for repo in repos if repo.repo_id == name for revision in repo.revisions]
    files: dict[str, RemoteFile | Path] = {}
    for revision in sorted(revisions, key=lambda each: ("main" in each.refs, each.last_modified), reverse=True):
        for file in sorted(revision.files, key=lambda each: each.file_path):
            files.setdefault(file.file_path.relative_to(revision.snapshot_path).as_posix(), file.file_path)
    return Repository(name, "", files)


def _model_paths(repository: Repository, quant: str, file: str) -> tuple[str, ...]:
    """Returns the paths of all files of the model. Raises HubError, which names the existing files or quantizations."""
    name, paths = repository.name, list(repository.files)
    if not (models := [path for path in paths if path.endswith(".gguf")]):
        raise HubError(f"{name} has no GGUF files; repositories with GGUFs are often named like it, with -GGUF")
    if file:
        if file not in paths:
            raise HubError(f"{name} has no file {file!r}{nearest_hint(file, models)}")
        chosen = file
    elif not (chosen := choose_model(paths, quant) or ""):
        quants = ", ".join(quants_of(paths)) or "none in the names of files"
        raise HubError(f"{name} has no model with the quantization {quant!r}; it has: {quants}")
    files = files_of(paths, chosen)
    if missing := missing_parts(files):
        raise HubError(
            f"{chosen} in {name} is one of {parse_gguf_name(chosen).parts} files, of which {missing} are missing"
        )
    return files


def _cached_model(repository: Repository, quant: str, file: str) -> Path:
    """Returns the path of the first file of a model in the cache. Raises HubError unless all its files are there."""
    if not repository.files:
        raise HubError(f"{repository.name} is not in the cache")
    path = repository.files[_model_paths(repository, quant, file)[0]]
    assert isinstance(path, Path)
    return path


def _download_model(hub: Hub, repository: Repository, paths: tuple[str, ...], note: Callable[[str], None]) -> Path:
    """Downloads the files that are not in the cache, and returns the cached path of the first. Raises HubError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
    from huggingface_hub.file_download import repo_folder_name

    blobs = hub.folder / repo_folder_name(repo_id=repository.name, repo_type="model") / "blobs"
    files = [file for path in paths if isinstance(file := repository.files[path], RemoteFile)]
    missing = [file for file in files if not (blobs / file.etag).exists()]
    present = sum(path.stat().st_size for file in missing for path in blobs.glob(f"{file.etag}.*{PARTIAL_SUFFIX}"))
    check_space(repository.name, hub.folder, (file.size for file in missing), present)
    if missing:
        note(f"Downloading {paths[0]} of {repository.name} to {hub.folder}")
    with hub_errors(repository.name, token="authorization" in hub.headers):
        for file in missing:
            # huggingface_hub's own download restarts after an interruption, but larger files need its protocol.
            if file.etag and (file.size or 0) <= MAX_HTTP_DOWNLOAD_SIZE:
                download(file, blobs / file.etag, hub.headers, hub.folder / ".locks")
        found = [
            hf_hub_download(
                repository.name,
                path,
                cache_dir=hub.folder,
                endpoint=hub.endpoint,
                token=hub.token or None,
                library_name="paceline",
            )
            for path in paths
        ]
    return Path(found[0])
