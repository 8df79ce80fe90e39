"""The real server with a real model, over loopback, with the official `openai` client."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.api.server import Server, serving
from tests.conftest import MODEL

pytestmark = pytest.mark.timeout(180)
NAME = MODEL.stem
SKY: Any = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("-np", "16", "-c", "16384", "--alias", NAME) as server:
        server.ready()
        yield server
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def metric(server: Server, name: str, **labels: str) -> float:
    text = httpx2.get(f"{server.url}/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(model=NAME, messages=SKY, max_tokens=12, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].message.content or "") > 10
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.model_extra is not None
    assert reply.model_extra["timings"]["predicted_n"] == 12


def test_chat_stream_has_the_same_text(client: OpenAI) -> None:
    def complete(**options: Any) -> Any:
        return client.chat.completions.create(model=NAME, messages=SKY, max_tokens=16, temperature=0, **options)

    complete()  # the following two requests then have the same cached prefix
    whole = complete().choices[0].message.content
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 20
    assert chunks[-1].timings["cache_n"] > 20


def test_completions(client: OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt="One, two, three,", max_tokens=4, temperature=0, echo=True)
    assert reply.choices[0].text.startswith("One, two, three, four")
    stream = client.completions.create(model=NAME, prompt="One, two, three,", max_tokens=4, temperature=0, stream=True)
    assert "One, two, three," + "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text


def test_several_prompts_and_choices(client: OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt=["The moon", "The sun"], n=2, temperature=1.5, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in reply.choices}) == 4


def test_stop(client: OpenAI) -> None:
    reply = client.completions.create(
        model=NAME, prompt="One, two, three,", max_tokens=30, temperature=0, stop=[" five", " six"]
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text.strip() == "four,"


def test_a_seed_repeats_the_text(client: OpenAI) -> None:
    def complete(seed: int) -> str | None:
        plain = {"speculative": False}  # verification changes the batch, which can flip a near-tie
        reply = client.chat.completions.create(
            model=NAME, messages=SKY, max_tokens=16, temperature=0.8, seed=seed, extra_body=plain
        )
        return reply.choices[0].message.content

    complete(1)
    assert complete(1) == complete(1)
    assert complete(1) != complete(2)


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=NAME, messages=SKY, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == reply.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
        assert entry.logprob < 0


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_refusals(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=SKY, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt=[1, 10**6])
    assert caught.value.param == "prompt"


def test_a_body_that_is_too_large(server: Server) -> None:
    reply = httpx2.post(f"{server.url}/v1/completions", content=b"x" * 10_000_000)
    assert reply.status_code == 413


async def test_sixteen_streams(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def complete(number: int) -> int:
            stream = await client.completions.create(
                model=NAME,
                prompt=f"Count from {number}:",
                max_tokens=12,
                seed=number,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                last = chunk
            assert last.usage is not None
            return last.usage.completion_tokens

        assert await asyncio.gather(*map(complete, range(16))) == [12] * 16


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot(server: Server, stream: bool) -> None:
    before = metric(server, "paceline_requests_total", reason="cancelled")
    body = {"prompt": "On and on", "max_tokens": 2000, "stream": stream, "ignore_eos": True}
    try:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60 if stream else 0.5) as reply:
            next(reply.iter_raw())
    except httpx2.ReadTimeout:
        assert not stream
    until = time.monotonic() + 20
    while metric(server, "paceline_requests_total", reason="cancelled") == before:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert metric(server, "paceline_requests_running") == 0


@pytest.mark.parametrize(("grace", "signals"), [("0.5", 1), ("600", 2)], ids=["grace", "second signal"])
def test_shutdown_with_a_running_stream(grace: str, signals: int, short_model: Path) -> None:
    with serving("-m", str(short_model), "--grace", grace) as server:
        url = server.ready()
        body = {"prompt": "On and on", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            server.signal()
            time.sleep(0.2)
            assert httpx2.get(f"{url}/health").status_code == 503
            if signals > 1:
                server.signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert server.wait() == 0


def test_shutdown_lets_a_stream_finish(short_model: Path) -> None:
    with serving("-m", str(short_model), "--grace", "60") as server:
        url = server.ready()
        body = {"prompt": "On and on", "max_tokens": 40, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            server.signal()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait() == 0


def test_shutdown_while_loading() -> None:
    with serving() as server:
        server.until("^Loading")
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


def test_keys(short_model: Path) -> None:
    with serving("-m", str(short_model), "--api-key", "one", "--api-key", "two") as server:
        url = server.ready()
        assert httpx2.get(f"{url}/health").status_code == 200
        with OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert [model.id for model in client.with_options(api_key="two").models.list()] == [NAME]
        server.until("Authorization: Bearer YOUR_KEY")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"not a model"])
def test_a_broken_model(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with serving("-m", str(file)) as server:
        assert server.wait() == 1
        (message,) = [line for line in server.lines if not line.startswith("Loading")]
        assert message.startswith("paceline: ")
        assert str(file) in message


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--port", str(port)) as server:
            assert server.wait() == 1
            assert server.lines == [f"paceline: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_a_slot_outlives_the_server(tmp_path: Path, short_model: Path) -> None:
    body = {"prompt": "One, two, three, four, five, six, " * 12, "max_tokens": 8, "temperature": 0, "seed": 1}
    file = {"filename": "counting.bin"}
    replies: list[Any] = []
    for action in ("save", "restore"):
        with serving("-m", str(short_model), "-np", "2", "--slot-save-path", str(tmp_path)) as server:
            url = server.ready()
            if action == "restore":
                moved = httpx2.post(f"{url}/slots/0?action=restore", json=file, timeout=60).json()
            replies.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json())
            if action == "save":
                saved = httpx2.post(f"{url}/slots/0?action=save", json=file, timeout=60).json()
            server.signal()
            assert server.wait() == 0
    prompt = replies[0]["usage"]["prompt_tokens"]
    assert saved["n_saved"] == moved["n_restored"] == prompt + 7
    assert saved["n_written"] == moved["n_read"] == (tmp_path / "counting.bin").stat().st_size
    assert [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies] == [0, prompt - 2]
    assert replies[0]["choices"][0]["text"] == replies[1]["choices"][0]["text"]
