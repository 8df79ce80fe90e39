"""Options of `paceline serve` that print something instead of serving."""

from __future__ import annotations

import sys

from api.commands.models import model_list
from api.config.arguments import COMPLETION, LIST_CACHE, LIST_DEVICES, SPELLED, CommandOption
from api.config.flags import Flag
from api.config.hub import HubConfig
from api.generation.loaded_model import PACELINE_VERSION
from api.hub.repository import hub_of
from engine import DeviceInfo, list_devices

_COMPLETION_SCRIPT = """\
_paceline() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    if [[ $COMP_CWORD == 1 ]]; then
        COMPREPLY=($(compgen -W "serve chat top doctor flags cost models lookup --version --help" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "{flags}" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _paceline paceline
"""
_MIB = 2**20


def print_for_option(option: CommandOption) -> int:
    """Prints the text of one of `PRINTING_OPTIONS`, and returns the exit code."""
    sys.stdout.write(_text(option))
    return 0


def _text(option: CommandOption) -> str:
    if option == LIST_DEVICES:
        return devices_text(list_devices())
    if option == LIST_CACHE:
        return model_list(hub_of(HubConfig()))
    if option == COMPLETION:
        return completion_script()
    return f"paceline {PACELINE_VERSION}\n"


def devices_text(devices: list[DeviceInfo]) -> str:
    """Returns the list of devices as llama-server prints it."""
    lines = [
        f"  {each.name}: {each.description} ({each.total_bytes // _MIB} MiB, {each.free_bytes // _MIB} MiB free)"
        for each in devices
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"])]) + "\n"


def completion_script() -> str:
    """Returns a script for bash that completes commands, the names of settings, and files."""
    names = sorted(name for name, (option, _) in SPELLED.items() if isinstance(option, Flag | CommandOption))
    return _COMPLETION_SCRIPT.format(flags=" ".join(names))
