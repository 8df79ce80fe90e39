"""`paceline models`: lists the downloaded models; `paceline models rm NAME` removes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from api.config.hub import HubConfig
from api.hub.cache import cached_models, partial_bytes, remove_model, remove_partial_files
from api.hub.errors import HubError
from api.hub.repository import Hub, hub_of
from api.server.terminal import print_line

_USAGE = """\
usage: paceline models                 lists the downloaded models with their sizes
       paceline models rm NAME...      removes models, by user/model:quant, user/model or file name
       paceline models rm --partial    removes unfinished downloads"""


def run_models(arguments: Sequence[str]) -> int:
    """Prints or removes downloaded models, and returns the exit code: 1 for an unknown model, 2 for wrong arguments."""
    hub = hub_of(HubConfig())
    match list(arguments):
        case []:
            sys.stdout.write(model_list(hub))
        case ["-h" | "--help"]:
            sys.stdout.write(_USAGE + "\n")
        case ["rm", "--partial"]:
            print_line(f"Removed unfinished downloads: {_size(remove_partial_files(hub))}")
        case ["rm", *names] if names and not any(name.startswith("-") for name in names):
            return _remove(hub, names)
        case _:
            print_line(_USAGE)
            return 2
    return 0


def model_list(hub: Hub) -> str:
    """Returns a line for each downloaded model, with name, size and file, and the size of unfinished downloads."""
    models = cached_models(hub)
    width = max((len(model.name) for model in models), default=0)
    lines = [f"{model.name:{width}}  {_size(model.size):>9}  {model.path}" for model in models]
    if partial := partial_bytes(hub):
        lines.append(f"unfinished downloads: {_size(partial)}; paceline models rm --partial removes them")
    return "".join(f"{line}\n" for line in lines or [f"no models in {hub.folder}"])


def _remove(hub: Hub, names: Sequence[str]) -> int:
    try:
        for name in names:
            print_line(f"Removed {name}: {_size(remove_model(hub, name))}")
    except HubError as error:
        print_line(f"paceline: {error}")
        return 1
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
