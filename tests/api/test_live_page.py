"""The page's files and the events of its live view, without a browser."""

from __future__ import annotations

import asyncio
import re
from unittest.mock import Mock

import pytest
from msgspec import structs

from api.config.command_line import parse
from api.config.server import ServerConfig
from api.generation.loaded_model import AppState
from api.server.app import create_app
from api.ui.events import LiveEventsEndpoint
from api.ui.snapshot import Sample, live_snapshot
from tests.api.asgi import CapturedResponse, call
from tests.api.conftest import Apps
from tests.api.fake import SLOTS, FakeEngine, app_state
from tests.conftest import MODEL

EVENTS = "/v1/paceline/events"
# Bytes of the page with all of its files.
MAX_PAGE_BYTES = 100_000


def linked_files(name: str, response: CapturedResponse) -> set[str]:
    """Returns the paths of the files that the page or one of its modules names."""
    text = b"".join(response.chunks).decode()
    found = re.findall(r'(?:src|href)="(ui/[^"]+)"', text) if name == "/" else re.findall(r'from "\./([^"]+)"', text)
    return {f"/ui/{each.removeprefix('ui/')}" for each in found}


async def test_the_page_is_small_and_needs_no_key_and_no_model() -> None:
    """With keys, and while the model loads."""
    app = create_app(AppState(ServerConfig(api_keys=("k",))))
    files: dict[str, CapturedResponse] = {}
    names = ["/"]
    while names:
        name = names.pop()
        files[name] = answer = await call(app, "GET", name)
        assert answer.status == 200, name
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].startswith(("text/html", "text/css", "text/javascript", "image/svg+xml"))
        names += linked_files(name, answer) - files.keys() - set(names)
    assert {"/ui/style.css", "/ui/main.js", "/ui/live.js", "/ui/answer.js", "/ui/icon.svg"} <= files.keys()
    assert sum(len(chunk) for answer in files.values() for chunk in answer.chunks) < MAX_PAGE_BYTES
    assert b"<html data-needs-key" in files["/"].chunks[0]
    tag = files["/"].headers["etag"]
    assert (await call(app, "GET", "/", headers={"if-none-match": tag})).status == 304
    assert (await call(app, "GET", EVENTS)).status == 401
    assert (await call(app, "POST", "/")).status == 401
    assert (await call(app, "GET", "/ui/../page.py")).status == 404


@pytest.mark.parametrize("flag", ["--no-ui", "--no-webui"])
async def test_the_page_can_be_turned_off(flag: str) -> None:
    state = app_state(FakeEngine())
    state.config = parse(["-m", str(MODEL), flag]).server
    assert (await call(create_app(state), "GET", "/")).status == 404
    assert (await call(create_app(state), "GET", EVENTS, disconnect_after=1)).status == 200


async def test_the_loaded_share_is_in_the_error() -> None:
    state = AppState(ServerConfig())
    state.loaded_share = 0.4321
    answer = await call(create_app(state), "GET", EVENTS)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.json["error"]["progress"] == 0.432


async def test_all_viewers_get_one_snapshot(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed without viewers, and one snapshot for several of them."""
    stats = Mock(side_effect=engine.stats)
    monkeypatch.setattr(engine, "stats", stats)
    app = create_app(app_state(engine))
    viewers = await asyncio.gather(*(call(app, "GET", EVENTS, disconnect_after=1) for _ in range(5)))
    events = [viewer.events[0] for viewer in viewers]
    assert len({event["time"] for event in events}) == stats.call_count <= 2  # 2 if a second ends in between
    event = events[0]
    assert (event["model"], event["running"], event["waiting"]) == ("fake-1", 2, 1)
    assert event["kv"]["cells_running"] + event["kv"]["cells_idle"] == 60
    assert [slot["state"] for slot in event["slots"]] == ["decode", "idle", "idle", "idle"]
    assert event["slots"][0]["processed"] == 64
    assert [each["type"] for each in event["proposers"]] == ["suffix", "ngram-mod"]


async def test_a_server_without_slots_shows_none(app_of: Apps) -> None:
    answer = await call(app_of(slots_endpoint=False), "GET", EVENTS, disconnect_after=1)
    assert answer.events[0]["slots"] == []


async def test_viewers_are_told_of_the_shutdown(engine: FakeEngine) -> None:
    state = app_state(engine)
    endpoint = LiveEventsEndpoint(state, interval_seconds=0.01)
    sent: list[bytes] = []

    async def send(event: bytes) -> None:
        sent.append(event)
        state.draining = len(sent) == 2

    with pytest.raises(Exception, match="shutting down"):
        await endpoint._follow(Mock(send=send))
    assert len(sent) == 2


def test_rates_are_those_since_the_last_snapshot() -> None:
    engine = FakeEngine()
    stats, request = engine.stats(), SLOTS[0].request
    assert request is not None
    later = structs.replace(stats, completion_tokens=stats.completion_tokens + 30, steps=9, busy_seconds=2.6)
    running = structs.replace(SLOTS[0], request=structs.replace(request, emitted=17))
    before, now = Sample(1.0, stats, SLOTS), Sample(3.0, later, (running, *SLOTS[1:]))
    first = live_snapshot(0.0, "m", 512, engine.memory, None, before)
    assert (first.tokens_per_second, first.step_ms, first.slots[0].tokens_per_second) == (None, None, None)
    second = live_snapshot(0.0, "m", 512, engine.memory, before, now)
    assert (second.tokens_per_second, second.slots[0].tokens_per_second) == (15.0, 5.0)
    assert second.step_ms == pytest.approx(25.0)
    assert second.busy_seconds == 2.6
