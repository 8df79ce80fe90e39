"""Options of the server process: API keys of a file, prefix of paths, properties, log, HTTPS."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from api.__main__ import main
from api.config.command_line import OptionError, parse
from api.config.keys import check_key_files, configured_keys
from api.config.server import LogConfig
from api.server.lifecycle import START_FAILED, run
from api.server.logs import configure_logging
from tests.api.asgi import call, post
from tests.api.conftest import Apps

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


# ── API keys ──


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# ours\r\n one \n\ntwo\r\n")
    config = parse(["-m", "x", "--api-key", "zero", "--api-key-file", str(file)]).server
    check_key_files(config)
    assert [each.key for each in configured_keys(config)] == ["zero", "one", "two"]
    file.write_text("# none\n")
    for path, message in ((file, "has no keys"), (tmp_path / "absent", "No such file")):
        with pytest.raises(OptionError, match=message):
            check_key_files(parse(["-m", "x", "--api-key-file", str(path)]).server)


@pytest.mark.parametrize("key", ["", " ", ","])
def test_an_empty_key_is_refused(key: str) -> None:
    """A variable of a shell that is not set must not open the server."""
    with pytest.raises(OptionError, match="--api-key"):
        parse(["-m", "x", "--api-key", key])


@pytest.mark.parametrize("key", ["ключ", "clé", "à", "\udcff"], ids=ascii)
async def test_keys_outside_of_ascii(app_of: Apps, key: str) -> None:
    """Clients send the characters in UTF-8 or, where they have them, in Latin-1."""
    app = app_of(api_keys=["other", key])
    sent = [key.encode("utf-8", "surrogateescape").decode("latin-1")]
    sent += [key] if max(map(ord, key)) < 256 else []
    for text in sent:
        for headers in ({"authorization": f"Bearer {text}"}, {"x-api-key": text}):
            assert (await call(app, "GET", "/version", headers=headers)).status == 200
    assert (await call(app, "GET", "/version", headers={"x-api-key": sent[0][:-1]})).status == 401


# ── paths ──


async def test_prefix_of_all_paths(app_of: Apps) -> None:
    app = app_of(api_prefix="/llm/a")
    assert (await call(app, "GET", "/llm/a/health")).status == 200
    assert (await post(app, "/llm/a/v1/chat/completions", HELLO)).status == 200
    for path in ("/health", "/llm", "/llm/ab/health"):
        answer = await call(app, "GET", path)
        assert (answer.status, "begin with /llm/a" in answer.json["error"]["message"]) == (404, True)
    error = await post(app, "/llm/a/v1/messages", {})
    assert error.json["type"] == "error", "errors have the dialect of the path"


async def test_props_are_changed_only_with_the_flag(app_of: Apps) -> None:
    answer = await post(app_of(), "/props", {})
    assert (answer.status, "--props" in answer.json["error"]["message"]) == (501, True)
    assert (await post(app_of(props=True), "/props", {})).json == {"success": True}


# ── log ──


def logged(config: LogConfig, *, verbose: bool = False) -> None:
    """Logs a line of each level."""
    configure_logging(config, verbose=verbose)
    log = logging.getLogger("paceline")
    log.debug("details")
    log.info("request")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failure")
    logging.getLogger("paceline.native").debug("tensors")


@pytest.mark.usefixtures("_unchanged_log")
def test_forms_of_the_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logged(LogConfig(timestamps=False, file=str(tmp_path / "log")))
    lines = capsys.readouterr().err.splitlines()
    assert (lines[:2], lines[-1]) == (["INFO request", "ERROR failure"], "ValueError: why")
    logged(LogConfig(timestamps=False, file=str(tmp_path / "log")))
    assert (tmp_path / "log").read_text().splitlines() == lines * 2
    logged(LogConfig(prefix=False, timestamps=False, colors="on"))
    assert capsys.readouterr().err.splitlines()[-6] == "request"
    logged(LogConfig(timestamps=False, colors="on"))
    assert "\x1b[31mERROR\x1b[0m failure" in capsys.readouterr().err
    logged(LogConfig(jsonl=True))
    request, failure = map(json.loads, capsys.readouterr().out.splitlines())
    assert {name: request[name] for name in ("type", "level", "logger", "msg")} == {
        "type": "log",
        "level": "info",
        "logger": "paceline",
        "msg": "request",
    }
    assert failure["exception"].endswith("ValueError: why")


@pytest.mark.usefixtures("_unchanged_log")
@pytest.mark.parametrize(
    ("config", "verbose", "words"),
    [
        (LogConfig(disable=True), False, []),
        (LogConfig(verbosity=0), False, []),
        (LogConfig(verbosity=1), False, ["failure"]),
        (LogConfig(verbosity=3), False, ["request", "failure"]),
        (LogConfig(verbosity=3), True, ["details", "request", "failure"]),
        (LogConfig(verbosity=9), False, ["details", "request", "failure", "tensors"]),
    ],
    ids=str,
)
def test_levels_of_the_log(
    config: LogConfig, verbose: bool, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logged(config, verbose=verbose)
    written = capsys.readouterr().err
    assert [word for word in ("details", "request", "failure", "tensors") if word in written] == words


# ── files and addresses ──


@pytest.mark.usefixtures("_unchanged_log")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-file", "/nowhere/log"], "--log-file: cannot write /nowhere/log: No such file"),
        (["--ssl-key-file", "k"], "--ssl-key-file needs --ssl-cert-file"),
        (["--ssl-key-file", "/nowhere/k", "--ssl-cert-file", __file__], "--ssl-key-file: cannot read /nowhere/k"),
        (["--ssl-key-file", __file__, "--ssl-cert-file", __file__], "not a certificate"),
        (["--ssl-key-file", "/tmp", "--ssl-cert-file", __file__], "not a certificate"),
        (["--host", "127.0.0..1"], "cannot listen on 127.0.0..1:8000: not an address"),
    ],
    ids=["log", "one file", "no file", "no certificate", "folder", "address"],
)
def test_unusable_files(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--sim", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_unchanged_log")
def test_the_extra_is_named_where_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "api.server.tracing", raising=False)
    flags = ["--sim", "--port", "0", "--otlp-traces-endpoint", "http://127.0.0.1:1/v1/traces"]
    assert run(parse(flags)) == START_FAILED
    assert "paceline[otel]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["flags"], ["--version"], ["serve", "--help"], ["lookup", "build", "--help"]])
@pytest.mark.parametrize("line_buffered", [False, True])
def test_output_that_cannot_be_written(
    words: list[str], line_buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", buffering=1 if line_buffered else -1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 1
    assert capsys.readouterr().err == "paceline: cannot write the output: No space left on device\n"


def test_a_reader_that_has_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["flags"]) == 141
    assert capsys.readouterr().err == ""
