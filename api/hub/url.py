"""Models at a URL: the file and its parts, cached with their etags."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from api.hub.download import RemoteFile, check_space, download
from api.hub.errors import HubError, hub_errors, shown_url
from api.hub.gguf_names import all_parts
from api.hub.repository import REPLY_SECONDS, Hub

# Folder of downloads from URLs in the cache. huggingface_hub's scan of the cache skips this name with a warning.
URL_FOLDER = "paceline--urls"


def fetch_url(hub: Hub, url: str, target: str, note: Callable[[str], None]) -> Path:
    """Returns the first or only file of the model at `url` after all its files are downloaded.

    The first file goes to `target` and the others to its folder; with an empty `target` all go to the cache. A file
    whose etag on the server has changed is downloaded anew. If the server cannot be reached, existing files are used.
    `note` receives a line about a download, and about the use of existing files. Raises HubError.
    """
    urls = all_parts(url)
    first = Path(target) if target else _cached_path(hub, url)
    paths = [first, *(first.with_name(_file_name(part)) for part in urls[1:])]
    with hub_errors(shown_url(url), token=False):
        existing = {path for path in paths if path.exists()}
    if hub.offline:
        if missing := next((path for path in paths if path not in existing), None):
            raise HubError(f"{shown_url(url)} is not at {missing}, and --offline forbids the download")
        return first
    for part, path in zip(urls, paths, strict=True):
        try:
            _fetch_part(hub, part, path, note)
        except HubError as error:
            if path not in existing:
                raise
            note(f"{error}. The existing {path} is used.")
    return first


def _cached_path(hub: Hub, url: str) -> Path:
    source = hashlib.sha256(shown_url(url).rpartition("/")[0].encode()).hexdigest()[:12]
    return hub.folder / URL_FOLDER / source / _file_name(url)


def _file_name(url: str) -> str:
    name = Path(unquote(urlsplit(url).path)).name
    return "model.gguf" if name in ("", "..") else name


def _fetch_part(hub: Hub, url: str, path: Path, note: Callable[[str], None]) -> None:
    headers = hub.headers
    if urlsplit(url).netloc != urlsplit(hub.endpoint).netloc:  # the token is for the hub alone
        headers.pop("authorization", None)
    file = _describe(url, headers)
    etag_file = path.with_name(f"{path.name}.etag")
    if path.exists():
        if not file.etag or (etag_file.exists() and etag_file.read_text() == file.etag):
            return
        if not etag_file.exists():
            raise HubError(f"{path} exists and is not known to be a download of {file.name}")
    check_space(file.name, path.parent, [file.size])
    note(f"Downloading {file.name} to {path}")
    new_path = path.with_name(f"{path.name}.new")
    download(file, new_path, headers, hub.folder / ".locks")
    with hub_errors(file.name, token=False):
        new_path.replace(path)
        etag_file.write_text(file.etag)


def _describe(url: str, headers: dict[str, str]) -> RemoteFile:
    """Returns the size and the etag of the file at `url`. Raises HubError."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    name = shown_url(url)
    plain = {**headers, "Accept-Encoding": "identity"}
    with hub_errors(name, token="authorization" in headers):
        response = get_session().head(url, headers=plain, timeout=REPLY_SECONDS)
        hf_raise_for_status(response)
    linked = [reply.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) for reply in response.history]
    own = response.headers.get("ETag") or response.headers.get("Last-Modified")
    etag = next(filter(None, [*linked, own]), "")
    size = response.headers.get("Content-Length", "")
    return RemoteFile(name, url, int(size) if size.isdigit() else None, etag.removeprefix("W/").strip('"'))
