"""`paceline top`: a view of a running server in the terminal, refreshed until Ctrl+C."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from rich.console import Console, RenderableType
from rich.live import Live

from api.commands.chat import url_and_key
from api.commands.server_client import ServerClient, ServerError
from api.commands.top_sample import ServerFacts, read_sample
from api.commands.top_view import ServerHistory, server_view
from api.config.arguments import take_option
from api.config.values import OptionError
from api.server.terminal import print_line

_USAGE = """\
usage: paceline top [URL] [--interval SECONDS] [--count N] [--api-key KEY]

Shows slots, queue, KV cache, tokens per second, step time and drafts of the server at URL (default:
http://127.0.0.1:8000) until Ctrl+C. If stdout is not a terminal, the view is printed once, without colours.

  --interval SECONDS  time between two samples, 0.1 to 3600 (default: 1)
  --count N           number of views (default: 1 if stdout is not a terminal, else without end)
  --api-key KEY       key of the server (default: $LLAMA_API_KEY)
"""
# Status of a server whose model is not loaded yet.
_LOADING = 503
# Columns of the view if stdout is not a terminal.
_PLAIN_COLUMNS = 100


def run_top(arguments: Sequence[str], console: Console | None = None) -> int:
    """Shows the view and returns the exit code: 1 if there is no server at the start, 2 for invalid arguments."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE)
        return 0
    console = console or Console(width=None if sys.stdout.isatty() else _PLAIN_COLUMNS)
    try:
        interval_text, rest = take_option(arguments, "--interval")
        count_text, rest = take_option(rest, "--count", "-n")
        interval = _number("--interval", interval_text or "1", 0.1, 3600)
        count = _number("--count", count_text, 1, 2**31) if count_text else None if console.is_terminal else 1
        url, key = url_and_key(rest)
    except OptionError as error:
        print_line(f"paceline top: {error}")
        return 2
    try:
        with ServerClient(url, key) as client:
            show_server(client, console, interval, count)
    except ServerError as error:
        print_line(f"paceline: {error}")
        return 1
    except KeyboardInterrupt:
        pass  # the usual way to end the view
    return 0


def show_server(client: ServerClient, console: Console, interval: float, count: float | None) -> None:
    """Shows `count` views; None means no end. A terminal shows only the latest view.

    Raises ServerError if the first request fails, except on a terminal while the server's model is loading.
    """
    views = islice(_views(client, interval, at_once=console.is_terminal), None if count is None else int(count))
    if not console.is_terminal:
        for view in views:
            console.print(view)
        return
    with Live(console=console, screen=count is None, auto_refresh=False) as live:
        for view in views:
            live.update(view, refresh=True)


def _views(client: ServerClient, interval: float, *, at_once: bool) -> Iterator[RenderableType]:
    """Yields a view after each sample; unless `at_once`, from the second sample on, because rates need two."""
    facts, history = ServerFacts(), ServerHistory()
    outdated = True
    while True:
        problem = ""
        try:
            if outdated:
                facts = client.get_as("/props", ServerFacts)
            history.add(read_sample(client))
            outdated = False
        except ServerError as error:
            if history.now is None and not (at_once and error.status == _LOADING):
                raise
            problem, outdated = str(error), True
        if at_once or problem or history.rates:
            yield server_view(client.url, facts, history, problem)
        time.sleep(interval)


def _number(name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise OptionError(f"{name}: expected a number from {low:g} to {high:g}, not {text!r}")
    return value
