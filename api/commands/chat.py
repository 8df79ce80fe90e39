"""`paceline chat`: a conversation in the terminal, with a running server or with one of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec
from rich.console import Console

from api.commands.chat_session import ChatSession, Reply, ReplyTimings
from api.commands.own_server import own_server
from api.commands.server_client import ServerClient, ServerError, server_url
from api.config.arguments import take_option
from api.config.command_line import OptionError, parse
from api.config.keys import check_key_files
from api.http.decode_errors import nearest_hint
from api.server.terminal import print_line

_USAGE = """\
usage: paceline chat [URL] [--system TEXT] [--api-key KEY]
       paceline chat -m model.gguf [--system TEXT] [flags of paceline serve]

A conversation with the server at URL (default: http://127.0.0.1:8000), or with a server that is started on a free port
and ended with the conversation. The key of a server at a URL may also be in $LLAMA_API_KEY.

"""
_COMMANDS = {
    "/system": "[TEXT]      sets the system message, or removes it",
    "/set": "NAME [VALUE]   sets a field of the requests, such as temperature 0.2, or removes it",
    "/regenerate": "        replaces the last reply",
    "/clear": "             begins a new conversation",
    "/save": "FILE          writes the conversation: .json as a list of messages, else Markdown",
    "/help": "              lists the commands",
    "/quit": "              ends; so does Ctrl+D",
}
_HELP = "\n".join(
    [
        *(f"{name} {text}" for name, text in _COMMANDS.items()),
        "A line that ends with \\ continues. Ctrl+C stops a reply.",
    ]
)

ReadLine = Callable[[str], str]


def run_chat(arguments: Sequence[str], read_line: ReadLine = input) -> int:
    """Runs a conversation and returns the exit code: 1 if there is no server, 2 if the arguments are invalid."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE + _HELP + "\n")
        return 0
    try:
        system, rest = take_option(arguments, "--system")
        if any(word.startswith("-") for word in rest[:1]) and rest[0].partition("=")[0] != "--api-key":
            options = parse(rest, os.environ)
            check_key_files(options.server)
            with own_server(rest, options) as client:
                return _Terminal(client, system or "", read_line).run()
        url, key = url_and_key(rest)
        with ServerClient(url, key) as client:
            client.get("/health")
            return _Terminal(client, system or "", read_line).run()
    except OptionError as error:
        print_line(f"paceline chat: {error}")
        return 2
    except ServerError as error:
        print_line(f"paceline: {error}")
        return 1


def url_and_key(arguments: Sequence[str]) -> tuple[str, str]:
    """Returns the server's URL and the API key of a command line. Raises OptionError for other arguments."""
    key, rest = take_option(arguments, "--api-key")
    if unknown := [word for word in rest if word.startswith("-")] or rest[1:]:
        raise OptionError(f"unexpected argument {unknown[0]!r}; expected [URL] [--api-key KEY]")
    return server_url("".join(rest)), key or os.environ.get("LLAMA_API_KEY", "")


class _Terminal:
    """Runs the commands in the lines of a user, and shows replies to the other lines."""

    def __init__(self, client: ServerClient, system: str, read_line: ReadLine) -> None:
        self._session = ChatSession(client, system)
        self._read_line = read_line
        self._console = Console(highlight=False)
        self._interactive = sys.stdin.isatty()
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 (gives `input` editing and a history)

    def run(self) -> int:
        """Runs until the end of the input, `/quit`, or Ctrl+C at an empty prompt."""
        if self._interactive:
            self._console.out("/help lists the commands.", style="dim")
        while (text := self._message()) is not None:
            if text in ("/quit", "/exit"):
                break
            if not text:
                continue
            try:
                replies = self._command(text) if text.startswith("/") else self._session.ask(text)
                if replies is not None:
                    self._show(replies)
            except (ServerError, OptionError) as error:
                self._console.out(str(error), style="red")
        return 0

    def _message(self) -> str | None:
        """Returns the next message or command; None at the end of the input."""
        lines: list[str] = []
        try:
            while True:
                line = self._read_line(("… " if lines else "> ") if self._interactive else "")
                lines.append(line.removesuffix("\\"))
                if not line.endswith("\\"):
                    return "\n".join(lines).strip()
        except EOFError:
            return "\n".join(lines).strip() or None
        except KeyboardInterrupt:
            return None

    def _show(self, reply: Reply) -> None:
        """Prints a reply as it arrives. Ctrl+C ends the request and keeps the text so far."""
        console, reasoning, ends_line = self._console, False, True
        with closing(reply):
            try:
                for part in reply:
                    if isinstance(part, ReplyTimings):
                        if console.is_terminal:
                            console.out(f"\n[{part}]", style="dim", end="")
                        continue
                    if reasoning and not part.reasoning:
                        console.out("")
                    reasoning, ends_line = part.reasoning, False
                    if reasoning:
                        console.out(part.text, style="dim", end="")
                    else:
                        console.file.write(part.text)  # the console would replace tabs
                    console.file.flush()
            except KeyboardInterrupt:
                console.out(" [stopped]", style="dim", end="")
                ends_line = False
            finally:
                if not ends_line:
                    console.out("")

    def _command(self, text: str) -> Reply | None:
        """Runs a command. Returns the requested reply; None for a command without a reply. Raises OptionError."""
        session, (name, _, rest) = self._session, text.partition(" ")
        rest = rest.strip()
        match name:
            case "/system":
                session.system = rest
            case "/set":
                _set_field(session, rest)
            case "/clear":
                session.turns.clear()
            case "/regenerate":
                if not session.turns:
                    raise OptionError("there is no reply to replace")
                return session.regenerate()
            case "/save":
                self._save(rest)
            case "/help":
                self._console.out(_HELP)
            case _:
                hint = nearest_hint(name, _COMMANDS) or "; /help lists all"
                raise OptionError(f"there is no command {name}{hint}")
        return None

    def _save(self, name: str) -> None:
        if not name:
            raise OptionError("/save needs a file name, such as chat.md or chat.json")
        path = Path(name).expanduser()
        try:
            self._session.save(path)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror}") from None
        self._console.out(f"Wrote {path}", style="dim")


def _set_field(session: ChatSession, text: str) -> None:
    """Sets a field of the requests to a JSON value or a plain text; without a value removes it. Raises OptionError."""
    name, _, value = text.partition(" ")
    if not name or name in ("messages", "stream"):
        raise OptionError("/set needs the name of a field and its value, such as temperature 0.2")
    if not value:
        session.fields.pop(name, None)
        return
    try:
        session.fields[name] = msgspec.json.decode(value)
    except msgspec.DecodeError:
        session.fields[name] = value.strip()
