"""Replaces the repositories and URLs in the options by files, which are downloaded if the cache lacks them."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from api.config.options import Options
from api.hub.errors import HubError
from api.hub.repository import Hub, fetch_model, find_head, find_projector, hub_of
from api.hub.url import fetch_url
from engine import has_media_library


def resolve_models(options: Options, note: Callable[[str], None]) -> Options:
    """Returns the options with the paths of local files, and the repository as the alias if none is given.

    `note` receives a line about each download, and about each cached file that is used because the hub cannot be read.
    Raises HubError. Imports huggingface_hub only if a model is to be downloaded.
    """
    config = options.hub
    if config.file and not config.repo:
        raise HubError(f"-hff {config.file} names a file in a repository: name the repository with -hf")
    if not (config.repo or config.url or config.draft_repo or config.mmproj_url):
        return options
    try:
        hub = hub_of(config)
        model, draft, server, media = options.model, options.draft, options.server, options.media
        if config.repo:
            model = structs.replace(model, path=str(fetch_model(hub, config.repo, config.file, note)))
            server = structs.replace(server, alias=server.alias or (config.repo,))
        elif config.url:
            target = "" if model.path == config.url else model.path
            model = structs.replace(model, path=str(fetch_url(hub, config.url, target, note)))
        if config.mmproj_url:
            media = structs.replace(media, path=str(fetch_url(hub, config.mmproj_url, media.path, note)))
        elif config.repo and config.mmproj_auto and not media.path and has_media_library():
            projector = find_projector(hub, config.repo)
            path = str(fetch_model(hub, config.repo.partition(":")[0], projector, note)) if projector else ""
            media = structs.replace(media, path=path)
        name, file = _draft_file(hub, options)
        if name:
            draft = structs.replace(draft, path=str(fetch_model(hub, name, file, note)))
    except KeyboardInterrupt:
        raise HubError("interrupted; the same command continues the download") from None
    return structs.replace(options, model=model, draft=draft, server=server, media=media)


def _draft_file(hub: Hub, options: Options) -> tuple[str, str]:
    """Returns the repository of the draft model or of the MTP layers, and the file; an empty repository if there is
    none, and an empty file for the choice by quantization. As in llama-server, MTP layers precede a draft model in a
    repository of `-hfd`, and in that of `-hf` they are sought if `--spec-type` names `draft-mtp`."""
    config, types = options.hub, options.speculation.default_types
    repository, file = config.draft_repo, options.draft.path
    if repository:
        head = find_head(hub, repository, "") if not file and {"auto", "draft-mtp"} & {*types} else ""
    else:
        head = find_head(hub, config.repo, config.file) if config.repo and not file and "draft-mtp" in types else ""
        repository = config.repo if head else ""
    return (repository.partition(":")[0], head) if head else (repository, file)
