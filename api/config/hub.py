"""Settings of models that are downloaded: repository, file, URL and access."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from msgspec import Meta, Struct

# user/model, or user/model:quant.
REPOSITORY_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class HubConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model's repository or URL, and the access to it. The server loads the downloaded file."""

    repo: Annotated[
        str,
        Meta(
            description="repository of the model, as user/model:quant; without :quant the file is Q4_K_M, else Q8_0, "
            "else the first; the files are downloaded to the cache of huggingface_hub, or to $LLAMA_CACHE; replaces "
            "--model"
        ),
    ] = ""
    file: Annotated[str, Meta(description="file in the repository of --hf-repo, instead of the choice by quant")] = ""
    draft_repo: Annotated[
        str,
        Meta(
            description="repository of the draft model, like --hf-repo; --model-draft then names a file in it, and "
            "without that a file mtp-*.gguf with MTP layers precedes a draft model unless --spec-type excludes it"
        ),
    ] = ""
    url: Annotated[
        str,
        Meta(description="URL of the model's GGUF file, which is downloaded to --model, or to the cache without it"),
    ] = ""
    mmproj_url: Annotated[
        str,
        Meta(
            description="URL of the projector's GGUF file, which is downloaded to --mmproj, or to the cache without it"
        ),
    ] = ""
    mmproj_auto: Annotated[
        bool,
        Meta(
            description="also download the projector of the repository --hf-repo, if it has one and the build reads "
            "images"
        ),
    ] = True
    token: Annotated[
        str,
        Meta(description="access token for private and gated repositories; empty is the one saved by `hf auth login`"),
    ] = ""
    offline: Annotated[bool, Meta(description="use downloaded files only, without any connection")] = False


def hub_problem(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one sentence about contradictory or malformed settings of models to download; empty if there are none."""
    hub = tables.get("hub", {})
    repo, url = hub.get("repo"), hub.get("url")
    for flag, name in (("-hf", repo), ("-hfd", hub.get("draft_repo"))):
        if name and not REPOSITORY_NAME.fullmatch(name):
            return f"{flag}: expected a repository like user/model or user/model:Q4_K_M, not {name!r}"
    if repo and url:
        return f"-hf {repo} and -mu {url} both name a model: leave one out"
    if url and not (urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname):
        return f"-mu: expected a URL like https://host/folder/model.gguf, not {url!r}"
    if (found := hub.get("mmproj_url")) and urlsplit(found).scheme not in ("http", "https"):
        return f"-mmu: expected a URL like https://host/folder/mmproj.gguf, not {found!r}"
    return ""


def named_model(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the repository or URL of the model, a placeholder for the model's path; empty without either."""
    hub = tables.get("hub", {})
    return str(hub.get("repo") or hub.get("url") or "")
