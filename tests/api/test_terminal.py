"""The lines that the server writes to the terminal."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.server.lifecycle import listen
from api.server.terminal import ProgressBar, client_url, start_message
from tests.api.fake import INFO, FakeEngine, app_state
from tests.api.test_embeddings import embedding_engine


def test_lines_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("Loading m.gguf") as bar:
        for share in (0.0, 0.1, 0.3, 0.4, 0.8, 0.9, 1.0, 1.0):
            bar.update(share)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Loading m.gguf", *(f"Loading m.gguf: {percent} %" for percent in (25, 75, 100))]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with ProgressBar("Loading m.gguf") as bar:
        bar.update(0.5)
    shown = capsys.readouterr().err
    assert "Loading m.gguf" in shown
    assert "50 %" not in shown


def test_start_message() -> None:
    info = msgspec.structs.replace(INFO, chat_template="{{ messages }}")
    model = app_state(FakeEngine(info=info), alias=["me", "you"]).loaded
    assert model is not None
    message = start_message(model, "http://127.0.0.1:8000", "http://[::1]:8000")
    first, layout, speculation, page, *command = message.split("\n")
    assert first == (
        "Serving me, you on http://127.0.0.1:8000 and http://[::1]:8000 · 4 slots · per-slot KV, 512 tokens each · "
        "no device"
    )
    assert layout == "KV layout: each slot has 512 tokens"
    assert speculation.startswith("Speculation: auto (prediction, ")
    assert page == "Page: http://127.0.0.1:8000/"
    assert command[0] == ("Try: curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\")
    assert "YOUR_KEY" not in str(command)


def test_start_message_with_a_missing_template() -> None:
    model = app_state(FakeEngine(), api_keys=["k"]).loaded
    assert model is not None
    shown = start_message(model, "x")
    assert shown.startswith("Note: The model has no chat template; ChatML is used.\n")
    assert "YOUR_KEY" in shown


def test_start_message_with_embeddings() -> None:
    engine = embedding_engine()
    model = app_state(engine).loaded
    assert model is not None
    line = "Embeddings: embedder, pooling mean, at most 64 tokens for each input"
    assert line in start_message(model, "http://x").split("\n")
    engine.info = msgspec.structs.replace(INFO, generates=False)
    assert start_message(model, "http://x").split("\n") == ["Serving fake-1 on http://x · no device", line]


DRAFT: dict[str, Any] = {"draft": {"path": "/models/small.gguf"}}
DRAFTLESS = "prediction, grammar, ngram-simple, ngram-map-k, ngram-map-k4v, ngram-mod, ngram-cache, suffix"


@pytest.mark.parametrize(
    ("options", "unavailable", "expected"),
    [
        ({}, {}, [f"Speculation: auto ({DRAFTLESS}, draft)"]),
        ({"speculation": {"types": ["none", "suffix"]}}, {}, ["Speculation: off"]),
        ({"speculation": {"types": ["suffix", "ngram-mod"]}}, {}, ["Speculation: on (ngram-mod, suffix)"]),
        ({"speculation": {"default": True}}, {}, ["Speculation: on (ngram-mod)"]),
        (
            {"speculation": {"types": ["draft", "suffix"]}, **DRAFT},
            {},
            ["Speculation: on (suffix, draft (small.gguf))"],
        ),
        (DRAFT, {}, [f"Speculation: auto ({DRAFTLESS}, draft (small.gguf))"]),
        (
            DRAFT | {"speculation": {"types": ["none"]}},
            {},
            ["Speculation: off; requests can select draft (small.gguf); --spec-type draft enables it for all"],
        ),
        (
            DRAFT,
            {"draft": "it does not fit"},
            ["Note: Proposer draft is off: it does not fit.", f"Speculation: auto ({DRAFTLESS})"],
        ),
        (
            {"draft": {"path": "/models/mtp-small.gguf", "threads": 2}},
            {"draft": "it has MTP layers", "draft-mtp": ""},
            [
                "Note: The file of -md has MTP layers: without effect are --threads-draft.",
                f"Speculation: auto ({DRAFTLESS}, draft-mtp (mtp-small.gguf))",
            ],
        ),
        (
            {"speculation": {"types": ["draft"]}},
            {"draft": "it is none"},
            ["Note: Proposer draft is off: it is none.", "Speculation: off"],
        ),
        (
            {"speculation": {"types": ["draft-mtp"]}},
            {},
            ["Note: Proposer draft-mtp is off: it is none.", "Speculation: off"],
        ),
        (
            {"speculation": {"types": ["auto"]}},
            dict.fromkeys(["draft", "prediction", "ngram-map-k", "ngram-map-k4v"], "of something"),
            ["Speculation: auto (grammar, ngram-simple, ngram-mod, ngram-cache, suffix)"],
        ),
    ],
    ids=str,
)
def test_start_message_has_the_proposers(
    options: dict[str, Any], unavailable: dict[str, str], expected: list[str]
) -> None:
    engine = FakeEngine(info=msgspec.structs.replace(INFO, chat_template="{{ messages }}"))
    reasons = {"draft-mtp": "it is none"} | unavailable
    engine.unavailable_proposers = {kind: reason for kind, reason in reasons.items() if reason}
    model = app_state(engine, options=options).loaded
    assert model is not None
    lines = start_message(model, "x").split("\n")
    assert [each for each in lines if any(word in each for word in ("Speculation", "Proposer", "effect"))] == expected


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("box.local", "http://box.local:80"),
    ],
)
def test_client_urls(host: str, url: str) -> None:
    assert client_url(host, 80) == url


def test_child_processes_do_not_inherit_the_listening_socket() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert not listener.get_inheritable()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        listen("192.0.2.1", 0)
