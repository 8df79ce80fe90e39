"""POST /infill and `suffix` of /v1/completions: prompts around a gap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from api.server.app import create_app
from api.templates.infill import InfillText, infill_prompt
from engine import FimTokens
from tests.api.asgi import post
from tests.api.fake import BOS, INFO, FakeEngine, app_state
from tests.api.server import ROOT, Server, serving

# Ids of bytes that the texts of these tests lack.
FIM = FimTokens(prefix=1, suffix=2, middle=3, repository=4, file=5)
CODER = ROOT / ".models" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def coder(fim: FimTokens = FIM, **fields: Any) -> FakeEngine:
    return FakeEngine(info=msgspec.structs.replace(INFO, fim=fim, **fields))


async def prompt_of(engine: FakeEngine, path: str, body: dict[str, Any], **options: Any) -> list[Any]:
    """Returns the prompt of the request's only sequence, with text as strings."""
    reply = await post(create_app(app_state(engine, **options)), path, body)
    assert reply.status == 200, reply.json
    parts: list[Any] = []
    for token in engine.requests[-1].prompt:
        if token < 6 or token == BOS:
            parts.append(token)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += chr(token)
        else:
            parts.append(chr(token))
    return parts


GAP = {"input_prefix": "before", "input_suffix": "after"}


async def test_the_parts_of_a_prompt() -> None:
    header = [4, "myproject\n", 5, "filename\n"]
    assert await prompt_of(coder(), "/infill", GAP) == [*header, 1, "before", 2, "after", 3]
    assert await prompt_of(coder(), "/infill", {**GAP, "prompt": "x = "}) == [*header, 1, "beforex = ", 2, "after", 3]
    extra = [{"filename": "a.py", "text": "A"}, {"text": "B", "filename": None}]
    files = [4, "myproject\n", 5, "a.py\nA", 5, "tmp\nB", 5, "filename\n"]
    assert await prompt_of(coder(), "/infill", {**GAP, "input_extra": extra}) == [*files, 1, "before", 2, "after", 3]


async def test_a_model_without_tokens_for_files() -> None:
    extra = [{"filename": "a.py", "text": "A"}]
    prompt = await prompt_of(coder(FIM._replace(repository=-1, file=-1)), "/infill", {**GAP, "input_extra": extra})
    assert prompt == ["\n\n--- snippet ---\n\nA", 1, "before", 2, "after", 3]


async def test_bos_is_first_and_the_suffix_can_be() -> None:
    fim = FIM._replace(repository=-1, file=-1)
    assert await prompt_of(coder(fim, bos_added=True), "/infill", GAP) == [BOS, 1, "before", 2, "after", 3]
    assert await prompt_of(coder(fim), "/infill", GAP, spm_infill=True) == [2, "after", 1, "before", 3]


async def test_names_of_special_tokens_in_code_are_text() -> None:
    body = {**GAP, "input_prefix": ["<s>", 65], "prompt": "<s>"}
    assert (await prompt_of(coder(), "/infill", body))[-6:] == [1, "<s>A", BOS, 2, "after", 3]


async def test_a_long_text_is_cut_around_the_gap() -> None:
    """The text next to the gap stays, and the rest of the context goes to other files."""
    engine = coder()
    body = {"input_prefix": "p" * 9000 + "P", "input_suffix": "S" + "s" * 9000, "n_predict": 28}
    prompt = await prompt_of(engine, "/infill", {**body, "input_extra": [{"text": "e" * 9000}]})
    room = engine.request_limit - 28 - 4
    prefix, suffix = prompt[-4], prompt[-2]
    assert (len(prefix), prefix[-1]) == (3 * (room // 4), "P")
    assert (len(suffix), suffix[0]) == (room // 4 - 2, "S")
    assert len(engine.requests[-1].prompt) <= engine.request_limit - 28
    short = await prompt_of(engine, "/infill", {**GAP, "n_predict": 28, "input_extra": [{"text": "e" * 9000}]})
    assert len(engine.requests[-1].prompt) == engine.request_limit - 28 - 1, "this model has no BOS"
    assert short[-7:] == [5, "filename\n", 1, "before", 2, "after", 3]


def test_a_cut_never_takes_the_beginning() -> None:
    text = InfillText([1] * 50, [2] * 50, [9] * 40)
    assert text.cut(40) == InfillText([1] * 30, [], [9] * 40)
    assert text.cut(0).prefix == []
    assert infill_prompt(FIM, -1, InfillText([], [])) == (1, 2, 3)


async def test_replies_have_the_shape_of_completions() -> None:
    app = create_app(app_state(coder()))
    whole = (await post(app, "/infill", GAP)).json
    assert (whole["content"], whole["stop_type"]) == ("Hello wörld", "eos")
    events = (await post(app, "/infill", {**GAP, "stream": True})).events
    assert "".join(event["content"] for event in events) == "Hello wörld"
    assert events[-1]["stop"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input_suffix": "x"}, "input_prefix"),
        ({"input_prefix": "x"}, "input_suffix"),
        ({**GAP, "prompt": ["x"]}, "prompt"),
        ({**GAP, "input_extra": {}}, "input_extra"),
        ({**GAP, "input_extra": [{}]}, "input_extra[0].text"),
        ({**GAP, "input_extra": [{"filename": "ok"}]}, "input_extra[0].text"),
        ({**GAP, "input_extra": [{"filename": 123, "text": "abc"}]}, "input_extra[0].filename"),
    ],
)
async def test_invalid_bodies(body: dict[str, Any], field: str) -> None:
    reply = await post(create_app(app_state(coder())), "/infill", body)
    assert (reply.status, reply.json["error"]["param"]) == (400, field)


async def test_a_model_without_fim_tokens() -> None:
    app = create_app(app_state(FakeEngine()))
    reply = await post(app, "/infill", GAP)
    assert reply.status == 501
    assert "no token for prefix, suffix, middle" in reply.json["error"]["message"]
    refused = await post(app, "/v1/completions", {"prompt": "x", "suffix": "y"})
    assert (refused.status, refused.json["error"]["param"]) == (400, "suffix")
    assert (await post(app, "/v1/completions", {"prompt": "x", "suffix": ""})).status == 200


async def test_suffix_of_completions() -> None:
    body = {"prompt": "before", "suffix": "after"}
    assert await prompt_of(coder(), "/v1/completions", body) == [1, "before", 2, "after", 3]
    tokens = {"prompt": list(b"before"), "suffix": "after"}
    assert await prompt_of(coder(), "/v1/completions", tokens) == [1, "before", 2, "after", 3]
    engine = coder()
    app = create_app(app_state(engine))
    reply = (await post(app, "/v1/completions", {**body, "prompt": ["a", "b"], "echo": True})).json
    assert [choice["text"] for choice in reply["choices"]] == ["aHello wörld", "bHello wörld"]
    assert [request.prompt for request in engine.requests] == [(1, 97, 2, *b"after", 3), (1, 98, 2, *b"after", 3)]
    rendered = (await post(app, "/v1/completions/render", body)).json
    assert rendered[0]["token_ids"] == [1, *b"before", 2, *b"after", 3]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not Path(CODER).exists():
        pytest.skip(f"needs {CODER.name}")
    with serving("-m", str(CODER), "-np", "2") as server:
        server.ready()
        yield server


@pytest.mark.timeout(120)
def test_a_coder_fills_the_gap(server: Server) -> None:
    body = {"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n\nprint(add(1, 2))\n"}
    sampling = {"temperature": 0, "n_predict": 6}
    reply = httpx2.post(f"{server.url}/infill", json={**body, **sampling}, timeout=60).json()
    assert reply["content"].startswith("a + b")
    assert reply["prompt"].endswith("<|fim_suffix|>\n\nprint(add(1, 2))\n<|fim_middle|>")
    completion = {"prompt": body["input_prefix"], "suffix": body["input_suffix"], "max_tokens": 6, "temperature": 0}
    choice = httpx2.post(f"{server.url}/v1/completions", json=completion, timeout=60).json()["choices"][0]
    assert choice["text"].startswith("a + b")
