"""Embeddings of the native library: values, batches, pooling types, and wrong models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import PoolingType
from llama_cpp import Llama

from engine import Engine, EngineConfig, ModelError, Request, RequestRefused
from tests.conftest import MODEL
from tests.native import tiny, tiny_bert

TEXTS = ("a cat sat", "the dog ran off, did it?", "x", "10 birds.")
POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.bert(tmp_path_factory.mktemp("models") / "bert.gguf")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "reranker.gguf"
    return tiny_bert.bert(path, ranks=True, pooling=PoolingType.RANK)


def opening(served: Path = MODEL, /, **embedding: Any) -> Any:
    config = EngineConfig.of(path=served, slots=2, context=1024, threads=1, warmup=False, embedding=embedding)
    return Engine.open(config)


def reference(path: Path, texts: tuple[str, ...], pooling: str) -> list[np.ndarray[Any, Any]]:
    model = Llama(str(path), embedding=True, pooling_type=POOLING[pooling], n_ctx=128, n_threads=1, verbose=False)
    try:
        return [np.atleast_2d(np.array(model.embed(text), np.float32)) for text in texts]
    finally:
        model.close()


def tokenized(engine: Engine, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    assert engine.embeddings is not None
    return [engine.embeddings.vocab.tokenize(text, special=True) for text in texts]


@pytest.mark.parametrize(("pooling", "second"), [("mean", False), ("mean", True), ("last", True), ("none", True)])
async def test_values_are_those_of_the_library(bert: Path, pooling: str, second: bool) -> None:
    path = bert if second else MODEL
    served, flags = (bert, {"path": str(bert)}) if second else (MODEL, {"on": True})
    async with opening(served, pooling=pooling, **flags) as engine:
        together = await engine.embed(tokenized(engine))
        assert engine.embeddings is not None
        assert engine.embeddings.info.pooling == pooling
        assert engine.embeddings.info.width == (tiny_bert.WIDTH if second else 576)
        alone = [(await engine.embed([tokens]))[0] for tokens in tokenized(engine)]
    for ours, single, theirs in zip(together, alone, reference(path, TEXTS, pooling), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(ours, single, atol=1e-4, rtol=1e-4)


async def test_the_pooling_of_the_model_is_the_default(tmp_path: Path) -> None:
    for pooling, expected in ((PoolingType.CLS, "cls"), (None, "mean"), (PoolingType.NONE, "mean")):
        path = tiny_bert.bert(tmp_path / "other.gguf", pooling=pooling)
        async with opening(path) as engine:
            assert engine.embeddings is not None
            assert engine.embeddings.info.pooling == expected


@pytest.mark.parametrize("kind", [tiny.recurrent, tiny.hybrid, tiny.windowed])
async def test_kinds_of_models(tmp_path: Path, kind: Any) -> None:
    """Inputs of different lengths in one request are pooled as wholes, also if the model has a state."""
    async with opening(kind(tmp_path / "model.gguf"), on=True, pooling="mean") as engine:
        inputs = [list(range(5, 5 + length)) for length in (3, 40, 11, 40)]
        together = await engine.embed(inputs)
        for tokens, vectors in zip(inputs, together, strict=True):
            np.testing.assert_allclose(vectors, (await engine.embed([tokens]))[0], atol=1e-3)


async def test_a_model_that_only_computes_embeddings(bert: Path) -> None:
    """The engine opens without cells, embeds, and refuses to generate."""
    async with opening(bert) as engine:
        assert not engine.info.generates
        vectors = await engine.embed(tokenized(engine))
        np.testing.assert_allclose(vectors[0], reference(bert, TEXTS[:1], "mean")[0], atol=1e-4)
        with pytest.raises(RequestRefused, match="computes embeddings, not text"):
            engine.generate(Request(prompt=(1, 2)))
        assert [slot.busy for slot in await engine.slot_states()] == [False, False]
        await engine.drain(1.0)


async def test_scores(reranker: Path) -> None:
    async with opening(reranker) as engine:
        assert engine.embeddings is not None
        assert (engine.embeddings.info.pooling, engine.embeddings.info.width) == ("rank", 1)
        assert engine.embeddings.info.marks == ((2,), (3,), ())
        scores = await engine.embed(tokenized(engine))
    expected = [row[0, 0] for row in reference(reranker, TEXTS, "rank")]
    np.testing.assert_allclose([score[0, 0] for score in scores], expected, atol=1e-4)
    assert len({float(score[0, 0]) for score in scores}) == len(TEXTS)


async def test_wrong_models(bert: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    for fields, message in (
        ({"path": str(bert), "rerank": True}, "no classification head"),
        ({"path": str(broken)}, "cannot load the model"),
        ({"path": "/nowhere/x.gguf"}, "cannot read the embedding model"),
    ):
        with pytest.raises(ModelError, match=message):
            async with opening(bert, **fields):
                pass
    config = EngineConfig.of(path="sim", sim={"on": True}, embedding={"on": True})
    with pytest.raises(ModelError, match="simulated"):
        async with Engine.open(config):
            pass


async def test_embeddings_beside_a_stream() -> None:
    """A stream and many requests for embeddings run at once, and a cancelled request leaves the others alone."""
    async with opening(on=True) as engine:
        inputs = tokenized(engine) * 2
        alone = await engine.embed(inputs)
        cancelled = asyncio.create_task(engine.embed(inputs * 10))
        together = asyncio.gather(*(engine.embed(inputs) for _ in range(2)))
        async with engine.generate(Request(prompt=tuple(inputs[0]), max_tokens=8, ignore_eos=True)) as generation:
            updates = [update async for update in generation]
        cancelled.cancel()
        for each in await together:
            np.testing.assert_allclose(np.concatenate(each), np.concatenate(alone), atol=1e-3)
        assert sum(len(update.ids) for update in updates if hasattr(update, "ids")) == 8


async def test_closing_ends_running_requests() -> None:
    async with opening(on=True) as engine:
        running = asyncio.create_task(engine.embed(tokenized(engine) * 500))
        await asyncio.sleep(0.05)
        await engine.drain(0.0)
    with pytest.raises(Exception, match="shutting down"):
        await running
