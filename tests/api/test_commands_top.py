"""`paceline top`: the view of samples from the fake engine."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
from rich.console import Console
from starlette.types import ASGIApp

from api.commands import top
from api.commands.server_client import ServerClient
from api.commands.top import run_top
from api.commands.top_sample import ListedSlot, Metrics, ServerSample
from api.commands.top_view import ServerHistory, bar, proposer_table, slot_table, sparkline
from tests.api.conftest import Apps
from tests.api.fake import SLOTS, FakeEngine
from tests.api.test_commands_chat import transport

View = Callable[..., tuple[int, str]]


@pytest.fixture
def view(app_of: Apps, monkeypatch: pytest.MonkeyPatch) -> View:
    """Returns a function that runs `paceline top` and returns the exit code and the output."""

    def run(*arguments: str, terminal: bool = False, **config: object) -> tuple[int, str]:
        app: ASGIApp = app_of(**config)
        monkeypatch.setattr(top, "ServerClient", partial(ServerClient, transport=transport(app)))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        file = io.StringIO()
        console = Console(file=file, width=100, force_terminal=terminal, no_color=not terminal)
        return run_top(arguments, console), file.getvalue()

    return run


def test_without_a_terminal_the_view_is_printed_once(view: View) -> None:
    code, text = view()
    assert code == 0
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("fake-1 · http://127.0.0.1:8000 · paceline ")
    assert lines[1] == "requests   2 running, 1 waiting · finished: 3 stop, 1 length"
    assert lines[3].startswith("step       idle")
    assert lines[4] == "KV cells   ████████████░░░░░░░░ 60% of 100 (per slot), 10% idle prefixes"
    assert lines[5].startswith("KV in RAM  ░░░░")
    rows = [line.split() for line in lines]
    assert ["0", "decode", "64", "32", "7", "0.0", "3", "3/4", "75%", "14%"] in rows
    assert ["1", "idle", "0%"] in rows
    assert ["suffix", "6", "20", "8", "40%", "75%", "0.80", "0.25", "+0.55"] in rows


def test_a_terminal_shows_the_latest_view(view: View) -> None:
    code, text = view("--count", "2", "--interval", "0.5", terminal=True)
    assert code == 0
    assert text.count("\x1b[1mfake-1") >= 2


def test_a_server_without_slots(view: View) -> None:
    assert "GET /slots is off" in view(slots_endpoint=False)[1]


def test_a_prefill(engine: FakeEngine, view: View) -> None:
    request = SLOTS[0].request
    assert request is not None
    request = msgspec.structs.replace(request, processed=0, emitted=0, draft=0, drafts=())
    engine.states = (msgspec.structs.replace(SLOTS[0], request=request),)
    assert ["0", "prefill", "50%", "64", "32", "0", "0.0", "14%"] in [line.split() for line in view()[1].splitlines()]


def sample(seconds: float, tokens: int, steps: int, decoded: int, task: int = 1) -> ServerSample:
    text = f"paceline_completion_tokens_total {tokens}\npaceline_steps_total {steps}\n"
    slot = {"id": 0, "n_ctx": 512, "is_processing": True, "id_task": task, "next_token": [{"n_decoded": decoded}]}
    return ServerSample(seconds, [msgspec.convert(slot, ListedSlot)], Metrics(text))


def test_rates() -> None:
    history = ServerHistory()
    history.add(sample(10, 100, 50, 8))
    assert history.rate("completion_tokens_total") == 0
    history.add(now := sample(12, 180, 60, 28))
    assert now.slots is not None
    assert (history.rate("completion_tokens_total"), history.slot_rate(now.slots[0])) == (40, 10)
    history.add(now := sample(14, 180, 60, 6, task=2))
    assert now.slots is not None
    assert ([*history.rates], history.slot_rate(now.slots[0])) == ([40, 0], 3)
    assert slot_table(now.slots, history).row_count == 1
    assert proposer_table(now) is None
    history.add(sample(16, 5, 2, 1))  # a new server
    assert [*history.rates] == []


def test_pictures() -> None:
    assert sparkline(deque([0.0, 5.0, 10.0])) == "▁▅█"
    assert sparkline(deque([0.0])) == "▁"
    assert (bar(1, 4), bar(9, 4), bar(1, 0)) == ("█" * 5 + "░" * 15, "█" * 20, "░" * 20)


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--count", "x"], ["--count", "0"]], ids=str)
def test_wrong_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_top(arguments) == 2
    assert "expected a number from" in capsys.readouterr().err
