# ruff: noqa: E402 (the handler of Ctrl+C is set before the slow imports)
"""The command line: `paceline serve` and the other commands."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence

# Ctrl+C ends the process silently while it imports, instead of with the traceback of some import.
_IN_MAIN_THREAD = threading.current_thread() is threading.main_thread()
_ON_INTERRUPT = signal.signal(signal.SIGINT, signal.SIG_DFL) if _IN_MAIN_THREAD else None

from api.commands.cost import run_cost
from api.commands.flags import every_spelling, flag_reference
from api.commands.lookup import run_lookup_build
from api.commands.models import run_models
from api.commands.printing import print_for_option
from api.config.command_line import OptionError, parse, printing_option
from api.config.keys import check_key_files
from api.generation.loaded_model import PACELINE_VERSION
from api.http.decode_errors import nearest_hint
from api.hub.errors import HubError
from api.hub.resolve import resolve_models
from api.server.lifecycle import run
from api.server.terminal import print_line
from api.templates.chat_template import InvalidTemplate, configured_kwargs, configured_template

if _ON_INTERRUPT is not None:
    signal.signal(signal.SIGINT, _ON_INTERRUPT)

# Exit codes of processes that SIGINT or SIGPIPE ended, as shells report them.
_INTERRUPTED, _BROKEN_PIPE = 130, 141
# Errors of writes to a full or failing disk, or to a terminal that is gone.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

USAGE = """\
usage: paceline serve -m model.gguf [flags]   serves a model over OpenAI's API
       paceline serve --help                  prints every flag with its default
       paceline flags [--all]                 prints the flags as Markdown, with --all every spelling
       paceline cost -m model.gguf [-o FILE.png|FILE.json] [flags]
                                              measures the cost of a step by number of rows
       paceline lookup build TEXT... -m model.gguf -o FILE
                                              counts n-grams of texts for ngram-cache
       paceline chat [URL | -m model.gguf [flags]]
                                              a conversation with a running server, or with one of its own
       paceline top [URL]                     shows slots, KV cache, speed and drafts of a running server
       paceline doctor -m model.gguf [--json] [flags]
                                              says what this machine and model allow, for bug reports
       paceline models [rm NAME]              lists or removes downloaded models
       paceline --version"""

_COMMANDS = ("serve", "flags", "cost", "lookup build", "chat", "top", "doctor", "models", "--version", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 means an invalid command line, 130 an interruption by Ctrl+C, 141
    a pipe of the output that nothing reads any more."""
    _open_closed_streams()
    try:
        try:
            return _run_command(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _WRITE_ERRORS or error.filename is not None:
            raise
        _discard_output()
        print_line(f"paceline: cannot write the output: {error.strerror}")
        return 1


def _open_closed_streams() -> None:
    """Opens the null device in place of standard streams that the caller has closed. Otherwise the next files that are
    opened would get the descriptors of these streams."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _discard_output() -> None:
    """Redirects stdout to the null device, so that flushing its buffer at the end of the process does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _run_command(arguments: Sequence[str]) -> int:
    match list(arguments):
        case ["serve", *rest]:
            return _serve(rest)
        case ["flags"]:
            sys.stdout.write(flag_reference())
        case ["flags", "--all"]:
            sys.stdout.write(flag_reference() + "\n" + every_spelling())
        case ["cost", *rest]:
            return run_cost(rest)
        case ["lookup", "build", *rest]:
            return run_lookup_build(rest)
        # Imported when they run, as the HTTP client takes a tenth of a second.
        case ["chat", *rest]:
            from api.commands.chat import run_chat

            return run_chat(rest)
        case ["top", *rest]:
            from api.commands.top import run_top

            return run_top(rest)
        case ["doctor", *rest]:
            from api.commands.doctor import run_doctor

            return run_doctor(rest)
        case ["models", *rest]:
            return run_models(rest)
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
        if option := printing_option(arguments):
            return print_for_option(option)
        options = parse(arguments, os.environ)
        check_key_files(options.server)
        configured_template(options.chat)
        configured_kwargs(options.chat)
    except (OptionError, InvalidTemplate) as error:
        print_line(f"paceline serve: {error}")
        return 2
    try:
        options = resolve_models(options, print_line)
    except HubError as error:
        print_line(f"paceline: {error}")
        return 1
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
