"""What the person who starts the server reads."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.config.server import ServerConfig
from api.server.life import listen
from api.server.terminal import Bar, address_of, welcome
from tests.api.fake import INFO, FakeEngine, site_of


def test_lines_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("Loading m.gguf") as bar:
        for share in (0.0, 0.1, 0.3, 0.4, 0.8, 0.9, 1.0, 1.0):
            bar.show(share)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Loading m.gguf", *(f"Loading m.gguf: {percent} %" for percent in (25, 75, 100))]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Bar("Loading m.gguf") as bar:
        bar.show(0.5)
    shown = capsys.readouterr().err
    assert "Loading m.gguf" in shown
    assert "50 %" not in shown


def test_welcome() -> None:
    info = msgspec.structs.replace(INFO, chat_template="{{ messages }}")
    served = site_of(FakeEngine(info=info), alias="me").served
    assert served is not None
    first, layout, guessing, *command = welcome(served, "http://127.0.0.1:8000").split("\n")
    assert first == "Serving me on http://127.0.0.1:8000 · 4 slots · per-slot KV, 512 tokens each · no device"
    assert layout == "KV layout: each slot has 512 tokens"
    assert guessing.startswith("Guessing ahead: prediction, ")
    assert command[0] == ("Try: curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\")
    assert "YOUR_KEY" not in str(command)


def test_welcome_says_what_is_missing() -> None:
    served = site_of(FakeEngine(), api_keys=["k"]).served
    assert served is not None
    shown = welcome(served, "x")
    assert shown.startswith("Note: The model has no chat template; ChatML is used.\n")
    assert "YOUR_KEY" in shown


DRAFT: dict[str, Any] = {"draft": {"path": "/models/small.gguf"}}
EVERYBODY = (
    "Guessing ahead: prediction, grammar, ngram-simple, ngram-map-k, ngram-map-k4v, ngram-mod, ngram-cache, suffix"
)


@pytest.mark.parametrize(
    ("options", "silent", "told"),
    [
        ({}, {}, [f"{EVERYBODY}, draft ()"]),
        ({"speculation": {"types": ["none", "suffix"]}}, {}, []),
        ({"speculation": {"types": ["suffix", "ngram-mod"]}}, {}, ["Guessing ahead: ngram-mod, suffix"]),
        ({"speculation": {"default": True}}, {}, ["Guessing ahead: ngram-mod"]),
        ({"speculation": {"types": ["draft", "suffix"]}, **DRAFT}, {}, ["Guessing ahead: suffix, draft (small.gguf)"]),
        (DRAFT, {}, [f"{EVERYBODY}, draft (small.gguf)"]),
        (
            DRAFT | {"speculation": {"types": ["none"]}},
            {},
            ["small.gguf guesses only for requests that ask for it; for all with --spec-type draft"],
        ),
        (DRAFT, {"draft": "it does not fit"}, ["Note: Nobody guesses by draft: it does not fit.", EVERYBODY]),
        (
            {"speculation": {"types": ["draft"]}},
            {"draft": "it is none"},
            ["Note: Nobody guesses by draft: it is none."],
        ),
        (
            {"speculation": {"types": ["auto"]}},
            dict.fromkeys(["draft", "prediction", "ngram-map-k", "ngram-map-k4v"], "of something"),
            ["Guessing ahead: grammar, ngram-simple, ngram-mod, ngram-cache, suffix"],
        ),
    ],
    ids=str,
)
def test_welcome_says_who_guesses(options: dict[str, Any], silent: dict[str, str], told: list[str]) -> None:
    engine = FakeEngine(info=msgspec.structs.replace(INFO, chat_template="{{ messages }}"))
    engine.silent = silent
    served = site_of(engine, options=options).served
    assert served is not None
    lines = welcome(served, "x").split("\n")
    assert [each for each in lines if "uess" in each] == told


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("box.local", "http://box.local:80"),
    ],
)
def test_addresses(host: str, address: str) -> None:
    assert address_of(ServerConfig(host=host), 80) == address


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(OSError, match="assign"):
        listen("192.0.2.1", 0)
