"""The command line: `paceline serve`, `cost`, `flags`, `lookup build`, `--version`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from api.commands.cost import show
from api.commands.lookup import build
from api.config.command_line import OptionError, parse
from api.config.flags import flag_table
from api.generation.loaded_model import VERSION
from api.server.life import run
from api.server.terminal import say
from api.templates.chat_template import TemplateTrouble, names_of, wanted

USAGE = """\
usage: paceline serve -m model.gguf [flags]   serve a model over OpenAI's API
       paceline serve --help                  every flag with its default
       paceline flags                         the same as Markdown
       paceline cost -m model.gguf [-o FILE.png|FILE.json] [flags]
                                              what a step of each number of rows costs here
       paceline lookup build TEXT... -m model.gguf -o FILE
                                              count texts for ngram-cache
       paceline --version"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 for a command line that makes no sense."""
    match list(sys.argv[1:] if arguments is None else arguments):
        case ["serve", *rest]:
            return _serve(rest)
        case ["flags"]:
            sys.stdout.write(flag_table() + "\n")
        case ["cost", *rest]:
            return show(rest)
        case ["lookup", "build", *rest]:
            return build(rest)
        case ["--version" | "-V"]:
            sys.stdout.write(f"paceline {VERSION}\n")
        case [] | ["-h" | "--help" | "help"]:
            sys.stdout.write(USAGE + "\n")
        case _:
            say(USAGE)
            return 2
    return 0


def _serve(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments, os.environ)
        wanted(options.chat)
        names_of(options.chat)
    except (OptionError, TemplateTrouble) as error:
        say(f"paceline serve: {error}")
        return 2
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
