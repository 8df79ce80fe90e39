"""Grammars on the real model: outputs match their spec, with and without drafts, and every token is known."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import pytest_asyncio
from msgspec import structs

from engine import (
    Engine,
    EngineConfig,
    Finished,
    FinishReason,
    Gbnf,
    GrammarSpec,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    Request,
    RequestRefused,
    SamplingParams,
    Speculation,
)
from engine.grammar.tokenizer import build_tokenizer
from engine.llama.model import LlamaBackend
from tests.native.test_engine import answer
from tests.native.test_proposers import EXACT

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "country": {"enum": ["France", "Japan", "Peru"]},
        "population": {"type": "integer", "minimum": 1000, "maximum": 99_999_999},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        "founded": {"type": "string", "pattern": r"^\d{4}-\d{2}$"},
        "coastal": {"type": ["boolean", "null"]},
    },
    "required": ["name", "country", "population", "rivers", "founded", "coastal"],
    "additionalProperties": False,
}
SCHEMA = JsonSchema(json.dumps(CITY).encode())
PROMPT = "<|im_start|>user\nDescribe a city as JSON.<|im_end|>\n<|im_start|>assistant\n"
NO_SPECULATION = Speculation()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(short_model: Path) -> AsyncIterator[Engine]:
    config = EngineConfig.of(path=short_model, slots=4, context=4096, speculation={"types": ["auto"]}, **EXACT)  # type: ignore[arg-type]
    async with Engine.open(config) as engine:
        yield engine


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def request_of(engine: Engine, spec: GrammarSpec, temperature: float, seed: int = 1, **options: Any) -> Request:
    return Request(
        prompt=tuple(engine.vocab.tokenize(PROMPT, special=True)),
        max_tokens=options.pop("max_tokens", 200),
        sampling=SamplingParams(temperature=temperature, seed=seed),
        grammar=await engine.compile(spec),
        **options,
    )


def text_of(engine: Engine, ids: list[int]) -> str:
    return b"".join(map(engine.vocab.piece, ids)).decode()


async def test_the_tokenizer_has_every_token(shared_backend: LlamaBackend) -> None:
    vocab = shared_backend.vocab
    tokenizer = build_tokenizer(vocab)
    assert tokenizer.vocab_size == vocab.size
    (start,) = vocab.tokenize("<|im_start|>", special=True)
    assert tokenizer.is_special_token(start)
    assert start in vocab.special
    for token in range(0, vocab.size, 7):
        if token not in vocab.special:
            assert tokenizer.decode_bytes([token]) == vocab.piece(token)
    text = 'Zoë says {"name": "naïve 世界 🙂", "n": 12}\n'
    assert tokenizer.tokenize_str(text) == vocab.tokenize(text, special=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_outputs_match_a_schema_and_drafts_do_not_change_them(engine: Engine, temperature: float) -> None:
    validator = jsonschema_rs.validator_for(CITY)
    requests = [await request_of(engine, SCHEMA, temperature, seed) for seed in range(2)]
    plain = [await answer(engine, structs.replace(each, speculation=NO_SPECULATION)) for each in requests]
    both = await asyncio.gather(*(answer(engine, each) for each in requests))
    fixed = Speculation(type=("grammar",), order="fixed")
    forced = await asyncio.gather(*(answer(engine, structs.replace(each, speculation=fixed)) for each in requests))
    assert [ids for ids, _ in plain] == [ids for ids, _ in both] == [ids for ids, _ in forced]
    for ids, end in plain:
        assert end.reason is FinishReason.STOP
        validator.validate(json.loads(text_of(engine, ids)))
    (drafting_type,) = {drafts.type for _, end in forced for drafts in end.drafts}
    assert drafting_type == "grammar"
    assert sum(end.usage.accepted for _, end in forced) > 10


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (Regex(r"\d{3}-[a-f]{4}"), r"\d{3}-[a-f]{4}"),
        (Gbnf('root ::= "yes" | "no" (" " [a-z]{2,8}){2}'), r"yes|no( [a-z]{2,8}){2}"),
        (Lark('start: <|im_start|> "user " /[a-z]{3,5}/ <|im_end|>'), r"user [a-z]{3,5}"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_other_specs(engine: Engine, spec: GrammarSpec, pattern: str) -> None:
    ids, end = await answer(engine, await request_of(engine, spec, 1.0))
    assert end.reason is FinishReason.STOP
    assert re.fullmatch(pattern, text_of(engine, ids))


async def test_json_cut_by_max_tokens_is_a_prefix(engine: Engine) -> None:
    ids, end = await answer(engine, await request_of(engine, JsonObject(), 0.0, max_tokens=5))
    assert end.reason is FinishReason.LENGTH
    assert text_of(engine, ids).startswith("{")


async def test_a_grammar_that_permits_all_changes_nothing(engine: Engine) -> None:
    ids, end = await answer(engine, await request_of(engine, Regex(r"(.|\n)*"), 0.0))
    free, stop = await answer(engine, structs.replace(await request_of(engine, Regex("x"), 0.0), grammar=None))
    assert (ids, end.stop) == (free, stop.stop), "equal tokens and stop"


async def test_refusals(engine: Engine) -> None:
    with pytest.raises(RequestRefused) as refusal:
        await engine.compile(JsonSchema(b'{"properties": {"a": {"uniqueItems": true, "type": "array"}}}'))
    assert refusal.value.field == "/properties/a/uniqueItems"
    other = structs.replace(await request_of(engine, Regex("x"), 0.0))
    assert other.grammar is not None
    other.grammar.vocabulary += 1
    with pytest.raises(RequestRefused, match="another model"):
        engine.generate(other)
    other.grammar.vocabulary -= 1


async def test_a_request_cancelled_while_it_compiles(engine: Engine) -> None:
    task = asyncio.create_task(engine.compile(Regex("[a-z]{1,200}")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    _, end = await answer(engine, await request_of(engine, Regex("[a-z]{1,20}"), 0.5))
    assert isinstance(end, Finished)
