"""The command line: `paceline serve`, `cost`, `flags`, `lookup build`, `--version`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from api.commands.cost import run_cost
from api.commands.flags import flag_reference
from api.commands.lookup import run_lookup_build
from api.config.command_line import OptionError, parse
from api.generation.loaded_model import PACELINE_VERSION
from api.http.decode_errors import nearest_hint
from api.server.lifecycle import run
from api.server.terminal import print_line
from api.templates.chat_template import InvalidTemplate, configured_kwargs, configured_template

USAGE = """\
usage: paceline serve -m model.gguf [flags]   serves a model over OpenAI's API
       paceline serve --help                  prints every flag with its default
       paceline flags                         prints the flags as Markdown
       paceline cost -m model.gguf [-o FILE.png|FILE.json] [flags]
                                              measures the cost of a step by number of rows
       paceline lookup build TEXT... -m model.gguf -o FILE
                                              counts n-grams of texts for ngram-cache
       paceline --version"""

_COMMANDS = ("serve", "flags", "cost", "lookup build", "--version", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 means an invalid command line."""
    match list(sys.argv[1:] if arguments is None else arguments):
        case ["serve", *rest]:
            return _serve(rest)
        case ["flags"]:
            sys.stdout.write(flag_reference())
        case ["cost", *rest]:
            return run_cost(rest)
        case ["lookup", "build", *rest]:
            return run_lookup_build(rest)
        case ["--version" | "-V"]:
            sys.stdout.write(f"paceline {PACELINE_VERSION}\n")
        case [] | ["-h" | "--help" | "help"]:
            sys.stdout.write(USAGE + "\n")
        case [command, *_]:
            print_line(f"paceline: unknown command {command!r}{nearest_hint(command, _COMMANDS)}\n{USAGE}")
            return 2
    return 0


def _serve(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments, os.environ)
        configured_template(options.chat)
        configured_kwargs(options.chat)
    except (OptionError, InvalidTemplate) as error:
        print_line(f"paceline serve: {error}")
        return 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
