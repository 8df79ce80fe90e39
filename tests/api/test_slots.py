"""GET /slots and POST /slots/{id}: replies, engine calls, and errors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from engine import EngineFault, RequestRefused
from tests.api.asgi import call, post
from tests.api.conftest import Apps
from tests.api.fake import SLOTS, FakeEngine


async def test_slot_states(app: ASGIApp) -> None:
    busy, *idle = (await call(app, "GET", "/slots")).json
    params = busy.pop("params")
    assert busy == {
        "id": 0,
        "n_ctx": 512,
        "speculative": True,
        "is_processing": True,
        "id_task": 9,
        "n_prompt_tokens": 70,
        "n_prompt_tokens_processed": 32,
        "n_prompt_tokens_cache": 32,
        "prompt_tokens": 64,
        "next_token": [{"has_next_token": True, "n_remain": 3, "n_decoded": 7}],
        "n_draft": 3,
        "drafts": [{"type": "suffix", "drafted": 4, "accepted": 3, "expected": 3.5, "chance": 0.75, "gain_ms": 250.0}],
    }
    assert (params["temperature"], params["seed"], params["n_predict"], params["max_tokens"]) == (0.8, 5, 10, 10)
    assert params["speculative.types"] == "suffix"
    assert not {"logit_bias", "dry_sequence_breakers", "stop", "prompt"} & params.keys()
    assert idle == [{"id": n, "n_ctx": 512, "speculative": True, "is_processing": False} for n in (1, 2, 3)]


async def test_an_idle_slot_has_no_budget(app: ASGIApp, engine: FakeEngine) -> None:
    engine.states = (msgspec.structs.replace(SLOTS[0], busy=False),)
    (idle,) = (await call(app, "GET", "/slots")).json
    assert idle["next_token"] == [{"has_next_token": False, "n_remain": -1, "n_decoded": 0}]


@pytest.mark.parametrize(("query", "status"), [("", 200), ("?fail_on_no_slot=1", 503), ("?fail_on_no_slot=0", 200)])
async def test_failing_without_an_idle_slot(app: ASGIApp, engine: FakeEngine, query: str, status: int) -> None:
    assert (await call(app, "GET", f"/slots{query}")).status == 200
    engine.states = SLOTS[:1]
    answer = await call(app, "GET", f"/slots{query}")
    assert answer.status == status
    if status == 503:
        error = answer.json["error"]
        assert (error["message"], error["type"], error["code"]) == ("no slot available", "unavailable_error", 503)


async def test_without_the_endpoint(app_of: Apps) -> None:
    app = app_of(slots_endpoint=False)
    for answer in (await call(app, "GET", "/slots"), await post(app, "/slots/0?action=erase", None)):
        assert answer.status == 501
        assert answer.json["error"]["type"] == "not_supported_error"
    assert "`--slots`" in (await call(app, "GET", "/slots")).json["error"]["message"]
    assert (await call(app, "GET", "/props")).json["endpoint_slots"] is False
    assert (await post(app_of(slots_endpoint=False, slot_save_path="x"), "/slots/0?action=erase", None)).status == 200


async def test_actions(app_of: Apps, engine: FakeEngine) -> None:
    app = app_of(slot_save_path="folder")
    body = {"filename": "x.bin", "more": 1}
    assert (await post(app, "/slots/3?action=save", body)).json == {
        "id_slot": 3,
        "filename": "x.bin",
        "n_saved": 70,
        "n_written": 1000,
        "timings": {"save_ms": 250.0},
    }
    assert (await post(app, "/slots/0?action=restore", body)).json == {
        "id_slot": 0,
        "filename": "x.bin",
        "n_restored": 70,
        "n_read": 1000,
        "timings": {"restore_ms": 250.0},
    }
    assert (await post(app, "/slots/1?action=erase", None)).json == {"id_slot": 1, "n_erased": 70}
    assert engine.log == ["save 3 folder/x.bin", "restore 0 folder/x.bin", "erase 1"]


@pytest.mark.parametrize("action", ["save", "restore"])
async def test_files_need_a_folder(app: ASGIApp, action: str) -> None:
    answer = await post(app, f"/slots/0?action={action}", {"filename": "x"})
    assert answer.status == 501
    assert answer.json["error"]["type"] == "not_supported_error"
    assert answer.json["error"]["message"].startswith(
        "This server does not support slots action. Start it with `--slot-save-path`"
    )
    assert (await post(app, "/slots/0?action=erase", None)).status == 200


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/slots/4?action=erase", 404, None),
        ("/slots/-1?action=erase", 404, None),
        ("/slots/x?action=save", 404, None),
        ("/slots/٣?action=save", 404, None),
        (f"/slots/{'9' * 5000}?action=save", 404, None),
        ("/slots/0?action=svae", 400, "action"),
        ("/slots/0", 400, "action"),
        ("/slots?action=save", 405, None),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_unknown_slots_and_actions(app_of: Apps, path: str, status: int, field: str | None) -> None:
    answer = await post(app_of(slot_save_path="x"), path, {"filename": "x"})
    assert (answer.status, answer.json["error"]["param"]) == (status, field)


INVALID_NAMES = (
    """ . .. a/b /a a\\b ../a a..b a. a\x7f a:b a* a? a" a< a| \uff0e\uff0e a\u2215b a\u2216b \ufffd \ufeffa"""
)


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "a\n", "a\0b", "a\x85", "x" * 256, "é" * 128, *INVALID_NAMES.split()], ids=ascii
)
async def test_invalid_file_names(app_of: Apps, engine: FakeEngine, name: str) -> None:
    app = app_of(slot_save_path="folder")
    for action in ("save", "restore"):
        answer = await post(app, f"/slots/0?action={action}", {"filename": name})
        assert (answer.status, answer.json["error"]["param"]) == (400, "filename")
    assert engine.log == []


@pytest.mark.parametrize("name", ["a", "a b.bin", ".a", "é-ü_1.x.y", "x" * 255, "日本"], ids=ascii)
async def test_valid_file_names(app_of: Apps, engine: FakeEngine, name: str) -> None:
    assert (await post(app_of(slot_save_path="folder"), "/slots/0?action=save", {"filename": name})).status == 200
    assert engine.log == [f"save 0 folder/{name}"]


@pytest.mark.parametrize("body", [b"", b"{", {}, {"filename": 1}, [], b'{"filename": "\\ud800"}'], ids=str)
async def test_invalid_bodies(app_of: Apps, body: Any) -> None:
    assert (await post(app_of(slot_save_path="folder"), "/slots/0?action=save", body)).status == 400


async def test_engine_errors(app_of: Apps, engine: FakeEngine) -> None:
    app = app_of(slot_save_path="folder")
    engine.slot_error = RequestRefused("Slot 0 is busy", field="id_slot")
    answer = await post(app, "/slots/0?action=erase", None)
    assert (answer.status, answer.json["error"]["message"]) == (400, "Slot 0 is busy")
    engine.slot_error = EngineFault("The disk is full")
    assert (await post(app, "/slots/0?action=save", {"filename": "x"})).status == 500


async def test_api_keys(app_of: Apps) -> None:
    app = app_of(api_keys=["one"])
    assert (await call(app, "GET", "/slots")).status == 401
    assert (await post(app, "/slots/0?action=erase", None)).status == 401


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
async def test_requests_prefer_a_slot(app: ASGIApp, engine: FakeEngine, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 1}
    for given, expected in ((2, 2), (0, 0), (-1, None), (None, None)):
        assert (await post(app, path, {**body, "id_slot": given})).status == 200
        assert engine.requests[-1].slot == expected
    for wrong in (4, -2):
        answer = await post(app, path, {**body, "id_slot": wrong})
        assert (answer.status, answer.json["error"]["param"]) == (400, "id_slot")
