"""The downloaded models: their names and sizes, and their removal."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from api.hub.download import PARTIAL_SUFFIX
from api.hub.errors import HubError, hub_errors
from api.hub.gguf_names import files_of, is_model, parse_gguf_name, split_repository
from api.hub.repository import Hub, scan_cache
from api.hub.url import URL_FOLDER


class CachedModel(NamedTuple):
    """A downloaded model."""

    name: str
    """Value of `-hf` for a model of a repository, else the name of the file."""
    size: int
    """Bytes of all its files."""
    path: Path
    """The first or only file."""


def cached_models(hub: Hub) -> list[CachedModel]:
    """Returns the models in the cache, sorted by name, those of repositories first."""
    cache = scan_cache(hub)
    found: dict[str, CachedModel] = {}
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id) if cache is not None else ():
        for revision in sorted(repo.revisions, key=lambda each: each.last_modified, reverse=True):
            sizes = {str(file.file_path): file.size_on_disk for file in revision.files}
            for path in filter(is_model, sorted(sizes)):
                quant = parse_gguf_name(path).quant
                name = f"{repo.repo_id}:{quant}" if quant else repo.repo_id
                size = sum(sizes[part] for part in files_of(sizes, path))
                found.setdefault(name, CachedModel(name, size, Path(path)))
    return [*found.values(), *_url_models(hub)]


def _url_models(hub: Hub) -> list[CachedModel]:
    files = sorted((hub.folder / URL_FOLDER).glob("*/*.gguf"))
    return [
        CachedModel(path.name, sum(Path(part).stat().st_size for part in files_of(map(str, files), str(path))), path)
        for path in files
        if is_model(str(path))
    ]


def partial_bytes(hub: Hub) -> int:
    """Returns the bytes of unfinished downloads."""
    return sum(path.stat().st_size for path in _partial_files(hub))


def _partial_files(hub: Hub) -> list[Path]:
    return [
        path for folder in ("*/blobs", f"{URL_FOLDER}/*") for path in hub.folder.glob(f"{folder}/*{PARTIAL_SUFFIX}")
    ]


def remove_model(hub: Hub, name: str) -> int:
    """Removes a model, or all files of a repository, and returns the freed bytes. Raises HubError."""
    with hub_errors(name, token=False):
        if removed := _remove_from_repository(hub, name) or _remove_url_model(hub, name):
            return removed
    names = ", ".join(model.name for model in cached_models(hub)) or "no model"
    raise HubError(f"{name} is not in the cache {hub.folder}, which has: {names}")


def _remove_from_repository(hub: Hub, name: str) -> int:
    repository, quant = split_repository(name)
    if (cache := scan_cache(hub)) is None:
        return 0
    revisions = [revision for repo in cache.repos if repo.repo_id == repository for revision in repo.revisions]
    files = [
        file
        for revision in revisions
        for file in revision.files
        if parse_gguf_name(file.file_name).quant == quant.upper() and file.file_name.endswith(".gguf")
    ]
    if quant:
        strategy = cache.delete_files(*files)
    else:
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in revisions))
    strategy.execute()
    return strategy.expected_freed_size


def _remove_url_model(hub: Hub, name: str) -> int:
    freed = 0
    for model in _url_models(hub):
        if model.name == name:
            files = [str(path) for path in model.path.parent.glob("*.gguf")]
            for path in map(Path, files_of(files, str(model.path))):
                freed += path.stat().st_size
                path.unlink()
                path.with_name(f"{path.name}.etag").unlink(missing_ok=True)
    return freed


def remove_partial_files(hub: Hub) -> int:
    """Removes unfinished downloads, and returns the freed bytes."""
    freed = partial_bytes(hub)
    for path in _partial_files(hub):
        path.unlink(missing_ok=True)
    return freed
