"""`paceline chat`: conversations with a fake engine, and with a server of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx2
import pytest
from starlette.types import ASGIApp

from api.__main__ import main
from api.commands import chat, server_client
from api.commands.chat import run_chat
from api.commands.chat_session import ChatSession
from api.commands.server_client import ServerClient, ServerError, server_url
from api.commands.top import run_top
from api.config.command_line import OptionError
from engine import Request
from tests.api.asgi import call
from tests.api.conftest import Apps
from tests.api.fake import FakeEngine
from tests.api.server import ROOT

Talk = Callable[..., tuple[int, list[str]]]


def transport(app: ASGIApp) -> httpx2.MockTransport:
    """Returns a transport that calls `app` on an event loop of each request."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        headers = {name: value for name, value in request.headers.items() if name not in ("content-length", "host")}
        body = request.read() or None
        reply = asyncio.run(call(app, request.method, request.url.raw_path.decode(), body, headers=headers))
        assert reply.status is not None
        return httpx2.Response(reply.status, headers=reply.headers, content=b"".join(reply.chunks))

    return httpx2.MockTransport(handle)


def lines_of(lines: Sequence[str]) -> Callable[[str], str]:
    """Returns a replacement of `input` for `lines`."""
    left = list(lines)

    def read_line(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read_line


@pytest.fixture
def talk(app: ASGIApp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Returns a function that gives lines to a conversation and returns its exit code and output."""
    monkeypatch.setattr(chat, "ServerClient", partial(ServerClient, transport=transport(app)))
    monkeypatch.setenv("LLAMA_API_KEY", "")

    def run(*lines: str, arguments: Sequence[str] = ()) -> tuple[int, list[str]]:
        code = run_chat(arguments, lines_of(lines))
        return code, capsys.readouterr().out.splitlines()

    return run


def test_a_conversation(talk: Talk, engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ("Hi\\", "there", "/set temperature 0.25", "/system Be kind.", "/regenerate", "", f"/save {file}", "/quit")
    assert talk(*lines, "never", arguments=["box:1"]) == (0, ["Hello wörld", "Hello wörld", f"Wrote {file}"])
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Hello wörld"},
    ]
    assert [request.sampling.temperature for request in engine.requests] == [0.8, 0.25]


def test_markdown(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    talk("Hi", "/clear", "Bye", f"/save {file}", arguments=["--system", "Be kind."])
    assert file.read_text() == "## system\n\nBe kind.\n\n## user\n\nBye\n\n## assistant\n\nHello wörld\n"


def test_a_failed_request_leaves_the_conversation(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    _, lines = talk("/set temperature -1", "Hi", f"/save {file}")
    assert len(lines) == 2
    assert "temperature" in lines[0]
    assert json.loads(file.read_text()) == []


def test_a_stopped_reply_stays(app: ASGIApp) -> None:
    with ServerClient("http://box", transport=transport(app)) as client:
        session = ChatSession(client)
        reply = session.ask("Hi")
        next(reply)
        reply.close()
        assert session.turns[1:] == [{"role": "assistant", "content": "Hel"}]


def test_a_model_cannot_control_the_terminal(talk: Talk, engine: FakeEngine) -> None:
    def script(request: Request) -> list[bytes]:
        return [b"\x1b[2Ja\tb\nc\x07"]

    engine.script = script
    assert talk("Hi") == (0, ["[2Ja\tb", "c"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/regenrate", "there is no command /regenrate; the nearest is /regenerate"),
        ("/regenerate", "there is no reply to replace"),
        ("/save", "/save needs a file name"),
        ("/save /nowhere/at/all", "cannot write /nowhere/at/all: No such file or directory"),
        ("/set", "/set needs the name of a field"),
        ("/help", "/system"),
    ],
)
def test_commands_that_cannot_run(talk: Talk, line: str, message: str) -> None:
    code, shown = talk(line)
    assert code == 0
    assert shown[0].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ftp://box"], 2, "'ftp://box' is no URL of a server"),
        (["one", "two"], 2, "unexpected argument 'two'"),
        (["box", "--fast"], 2, "unexpected argument '--fast'"),
        (["--temp", "1"], 2, "name a GGUF file with -m"),
        (["127.0.0.1:9"], 1, "paceline: no answer from http://127.0.0.1:9: nothing listens there"),
    ],
    ids=str,
)
def test_an_error_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("chat", "top") if "--temp" not in arguments else ("chat",):
        assert main([command, *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_server_with_keys(app_of: Apps) -> None:
    mock = transport(app_of(api_keys=["secret", "schlüssel"]))
    with ServerClient("http://box", transport=mock) as client, pytest.raises(ServerError, match=r"401.*--api-key KEY"):
        client.get("/props")
    for key in ("secret", "schlüssel"):
        with ServerClient("http://box", key, mock) as client:
            assert "total_slots" in client.get("/props")
        with ServerClient("http://box", key, mock) as client, pytest.raises(ServerError, match="is not a stream"):
            next(client.stream("/tokenize", {"content": "hi"}))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("[Errno 111] Connection refused", "nothing listens there"),
        ("[Errno -2] Name or service not known", "Name or service not known"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed", "its certificate is not trusted; SSL_CERT_FILE names"),
    ],
)
def test_connections_that_fail(failure: str, reason: str) -> None:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError(failure)

    with (
        ServerClient("https://box", transport=httpx2.MockTransport(fail)) as client,
        pytest.raises(ServerError, match=reason),
    ):
        client.get("/props")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("8080", "http://127.0.0.1:8080"),
        ("http://box/llm/v1/", "http://box/llm"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert server_url(text) == url


@pytest.mark.parametrize("text", ["http://", "http://box:port", "99999"])
def test_wrong_urls(text: str) -> None:
    with pytest.raises(OptionError, match="is no URL of a server"):
        server_url(text)


def test_control_characters() -> None:
    assert server_client.without_controls("a\x00\t\n\r\x1b\x9bb") == "a\t\nb"


def test_a_server_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """The server runs while the conversation does, and ends with it, also by SIGTERM."""
    command = [sys.executable, "-m", "api", "chat", "--sim", "--sim-cost", "free", "-c", "2048"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("/set max_tokens 3\nHi\n")
        process.stdin.flush()
        assert len(process.stdout.readline().split()) == 3
        url = next(word for word in capfd.readouterr().err.split() if word.startswith("http://127.0.0.1:"))
        assert run_top([url, "--interval", "0.1"]) == 0
        assert "simulated · http" in capfd.readouterr().out
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert run_top([url]) == 1
