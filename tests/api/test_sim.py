"""`paceline serve --sim`: the whole server with a real client and the simulated model."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from api.config.command_line import OptionError, parse
from engine import SIMULATED_MODEL
from tests.api.server import Server


def test_the_model_file_is_optional() -> None:
    options = parse(["--sim", "--sim-accept", "0.7", "-np", "256"])
    assert (options.model.path, options.sim.accept, options.batch.slots) == (SIMULATED_MODEL, 0.7, 256)
    assert parse(["--sim", "-m", "model.gguf"]).model.path == "model.gguf"
    with pytest.raises(OptionError, match="no model is given"):
        parse(["--sim-accept", "0.7"])


def test_an_unknown_cost_is_an_error() -> None:
    server = Server("--sim", "--sim-cost", "round", "--port", "0")
    server.until("--sim-cost is one of free, flat, linear or a file")
    assert server.process.wait(30) == 1
    server.close()


async def test_clients_are_served_with_drafts() -> None:
    server = Server("--sim", "--sim-cost", "free", "--sim-accept", "0.8", "-np", "8", "-c", "8192", "--port", "0")
    try:
        async with AsyncOpenAI(base_url=f"{server.ready()}/v1", api_key="none") as client:
            texts = await asyncio.gather(*(_text(client, n % 2) for n in range(8)))
    finally:
        server.close()
    assert texts[::2] == [texts[0]] * 4
    assert texts[0] != texts[1]


async def _text(client: AsyncOpenAI, number: int) -> str:
    stream = await client.chat.completions.create(
        model=SIMULATED_MODEL,
        messages=[{"role": "user", "content": f"Say something, {number}."}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, counted = "", 0
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        if chunk.usage is not None:
            counted = chunk.usage.completion_tokens
    assert counted == 40
    assert len(text.split()) == 40
    return text
