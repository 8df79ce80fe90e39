"""Defaults and limits that options set for the fields of requests."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp

from api.config.command_line import OptionError, parse
from api.generation.request_limits import check_request_defaults
from api.server.app import create_app
from api.server.terminal import start_message
from engine import RequestRefused
from tests.api.asgi import post
from tests.api.fake import FakeEngine, app_state

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
    "/completion": {"prompt": "hi"},
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "hi"},
}


def app_with(engine: FakeEngine, **generation: Any) -> ASGIApp:
    return create_app(app_state(engine, options={"generation": generation}))


@pytest.mark.parametrize("path", BODIES)
async def test_defaults_of_every_endpoint(engine: FakeEngine, path: str) -> None:
    app = app_with(
        engine,
        n_predict=9,
        ignore_eos=True,
        cache_prompt=False,
        reverse_prompt=("END",),
        special=True,
        grammar='root ::= "a"',
    )
    await post(app, path, BODIES[path])
    await post(app, path, {**BODIES[path], "ignore_eos": False, "cache_prompt": True, "stop": ["x"], "n_predict": 4})
    await post(app, path, {**BODIES[path], "n_predict": 50, "response_format": {"type": "text"}})
    first, second, third = engine.requests
    assert (first.max_tokens, first.ignore_eos, first.cache, first.stop) == (9, True, False, ("END",))
    assert first.grammar is not None
    assert first.control_texts
    assert (second.max_tokens, second.ignore_eos, second.cache, second.stop) == (4, False, True, ("x",))
    assert (third.max_tokens, third.grammar) == (9, None)


@pytest.mark.parametrize(
    ("n_predict", "asked", "tokens"), [(-1, None, None), (-1, -1, None), (-2, None, 98), (-2, 500, 500), (0, 5, 0)]
)
async def test_maximum_of_new_tokens(engine: FakeEngine, n_predict: int, asked: int | None, tokens: int | None) -> None:
    engine.request_limit = 100
    await post(app_with(engine, n_predict=n_predict), "/completion", {"prompt": "hi", "n_predict": asked})
    assert engine.requests[0].max_tokens == tokens


async def test_a_default_schema_does_not_apply_to_requests_with_tools_or_a_form(engine: FakeEngine) -> None:
    app = app_with(engine, json_schema='{"type": "integer"}')
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in ({"tools": tools}, {"guided_regex": "a+"}):
        assert (await post(app, "/v1/chat/completions", {**CHAT, **fields})).status == 200
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    assert (await post(app, "/v1/responses", {"input": "hi", "text": form})).status == 200
    form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert (await post(app, "/v1/messages", {**CHAT, "output_config": form})).status == 200


def test_notations(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('\ufeff{"type": "object"}')
    options = parse(
        shlex.split(
            rf"-m x -l 15043+1.5 -l 7-inf -jf {schema} -r '\n\x41\\' --sampler-seq tki --dry-sequence-breaker none "
            "-n -2 --top-nsigma 1.5 --mirostat 2 --adaptive-target -1"
        )
    )
    assert options.sampling.logit_bias == ((15043, 1.5), (7, -1e9))
    assert options.sampling.samplers == ("temperature", "top_k", "infill")
    assert options.sampling.dry_sequence_breakers == ()
    assert (options.generation.reverse_prompt, options.generation.json_schema) == (("\nA\\",), '{"type": "object"}')
    assert (options.generation.n_predict, options.sampling.mirostat) == (-2, 2)
    assert parse(["-m", "x", "--samplers", "temp;top-k;", "--no-escape", "-r", r"\n"]).generation.reverse_prompt == (
        r"\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-l", "5"], "--logit-bias: expected a token id with a signed bias such as 15043+1, not '5'"),
        (["-l", "5+nan"], "--logit-bias: expected a token id with a signed bias such as 15043+1, not '5+nan'"),
        (["--sampler-seq", "kq"], "--sampler-seq: unknown stage 'q'"),
        (["--samplers", "top_k;toop_p"], "--samplers: unknown stage 'toop_p'"),
        (["-j", "[]"], "--json-schema: expected a JSON object, not '[]'"),
        (["-j", "{}", "--grammar", "x"], "--grammar and --json-schema exclude each other"),
        (["--grammar", "x", "--grammar-file", "y"], "--grammar and --grammar-file exclude each other"),
        (["--grammar-file", "/absent"], "--grammar-file: cannot read /absent: No such file or directory"),
        (["--grammar-file", "/dev/null"], "--grammar-file: /dev/null is empty: leave --grammar-file out"),
        (["--mirostat", "3"], "--mirostat: expected a whole number from 0 to 2, not '3'"),
        (["--draft-min", "20", "--draft-max", "4"], "--draft-min: 20 is above --draft-max, 4"),
        (["--spec-ngram-mod-n-max", "16"], "--spec-ngram-mod-n-min: 48 is above --spec-ngram-mod-n-max, 16"),
    ],
    ids=str,
)
def test_refused_options(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        parse(["-m", "x", *arguments])
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("speculative", "status"),
    [
        ({"type": "draft", "n_min": 17}, 400),
        ({"type": "draft", "n_min": 20, "n_max": 40}, 400),
        ({"type": "ngram-simple", "n_min": 48}, 200),
        ({"type": "ngram-simple", "n_min": 49}, 400),
        ({"type": "ngram-cache", "n_min": 9, "n_max": 9}, 200),
        ({"type": ["ngram-cache", "suffix"], "n_min": 17}, 200),
    ],
    ids=str,
)
async def test_minimum_draft_lengths_that_no_draft_reaches(
    engine: FakeEngine, speculative: dict[str, Any], status: int
) -> None:
    body = {"prompt": "hi", "speculative": speculative}
    assert (await post(create_app(app_state(engine)), "/completion", body)).status == status


async def test_defaults_that_suit_no_request_end_the_start(engine: FakeEngine) -> None:
    biased = app_state(engine, options={"sampling": {"logit_bias": [[10**6, 1.0]]}}).model
    with pytest.raises(RequestRefused, match="--logit-bias: there is no token 1000000"):
        await check_request_defaults(biased)


def test_settings_of_an_absent_draft_model(engine: FakeEngine) -> None:
    model = app_state(engine, options={"draft": {"n_max": 5, "p_min": 0.5}}).model
    assert "There is no draft model (-md): without effect are --draft-max, --draft-p-min." in start_message(
        model, "url"
    )
