"""POST /v1/embeddings, /embeddings and /rerank: shapes, inputs and refusals; the real server with OpenAI's SDK."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from gguf import PoolingType
from starlette.types import ASGIApp

from api.generation.embedding import normalized
from api.server.app import create_app
from engine import EmbeddingInfo, EmbeddingModel, RerankMarks
from tests.api.asgi import post
from tests.api.fake import BOS, ByteVocab, FakeEngine, app_state
from tests.api.server import Server, serving
from tests.native import tiny_bert

INFO = EmbeddingInfo(
    name="embedder",
    path="/models/embedder.gguf",
    pooling="mean",
    width=3,
    limit=64,
    rerank_template="",
    marks=RerankMarks((1,), (2, 3), (4,)),
)


def embedding_engine(*, bos_added: bool = False, **fields: Any) -> FakeEngine:
    engine = FakeEngine()
    values = {name: getattr(INFO, name) for name in INFO.__struct_fields__} | fields
    engine.embeddings = EmbeddingModel(EmbeddingInfo(**values), ByteVocab(bos_added=bos_added))
    return engine


def app_of(engine: FakeEngine, **config: Any) -> ASGIApp:
    return create_app(app_state(engine, options={"embedding": {"path": INFO.path}}, **config))


async def embed(engine: FakeEngine, body: Any, path: str = "/v1/embeddings") -> Any:
    reply = await post(app_of(engine), path, body)
    assert reply.status == 200, reply.json
    return reply.json


async def test_owners_are_those_of_keys_users_and_addresses(tmp_path: Path) -> None:
    engine = embedding_engine(pooling="rank")
    keys = tmp_path / "keys"
    keys.write_text('[[keys]]\nkey = "k"\nname = "n"\nweight = 2.0')
    rerank = {"query": "q", "documents": ["d"], "user": "u"}
    await post(app_of(engine), "/rerank", rerank)
    await post(app_of(engine, keys=str(keys)), "/rerank", rerank, headers={"x-api-key": "k"})
    assert engine.owners == [("user:u", 1.0), ("key:n", 2.0)]
    engine = embedding_engine()
    await embed(engine, {"input": "a", "user": "u"})
    await embed(engine, {"input": "a"})
    assert engine.owners == [("user:u", 1.0), ("address:", 1.0)]


async def test_the_shape_of_openai() -> None:
    reply = await embed(embedding_engine(), {"input": ["ab", "c"], "model": "any", "embd_normalize": -1})
    assert reply == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 195.0, 98.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 99.0, 99.0]},
        ],
        "model": "embedder",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


async def test_base64_has_the_same_numbers() -> None:
    floats = (await embed(embedding_engine(), {"input": "ab", "encoding_format": "float"}))["data"][0]["embedding"]
    item = (await embed(embedding_engine(), {"input": "ab", "encoding_format": "base64"}))["data"][0]
    assert np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() == floats
    assert math.isclose(sum(number * number for number in floats), 1, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("ab", [[97, 98]]),
        ([5, 6], [[5, 6]]),
        ([5, "a", 6], [[5, 97, 6]]),
        (["ab", [5, 6]], [[97, 98], [5, 6]]),
        ([[5, 6], [7, "a"]], [[5, 6], [7, 97]]),
        ({"prompt_string": "a"}, [[97]]),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, [[97, 98]]),
        (["a", {"prompt_string": "b"}, {"content": [{"type": "text", "text": "c"}]}], [[97], [98], [99]]),
        ("<s>", [[BOS]]),
    ],
    ids=str,
)
async def test_inputs(given: Any, tokens: list[list[int]]) -> None:
    engine = embedding_engine()
    reply = await embed(engine, {"input": given})
    assert engine.embedded == tokens
    assert len(reply["data"]) == len(tokens)


async def test_special_tokens_surround_each_input() -> None:
    engine = embedding_engine(bos_added=True)
    await embed(engine, {"input": ["a", ["a", 5, "b"], [5, "a"], ""]})
    assert engine.embedded == [[BOS, 97], [BOS, 97, 5, 98], [5, 97], [BOS]]


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "input", "non-empty"),
        ({"input": []}, "input", "non-empty"),
        ({"input": ""}, "input", "is empty"),
        ({"input": ["a", ""]}, "input[1]", "is empty"),
        ({"input": ["a", "b" * 65]}, "input[1]", "too large: it has 65 tokens"),
        ({"input": [1, 300]}, "input[0]", "outside of 0 to 259"),
        ({"input": [1, [2]]}, "input", "mixes"),
        ({"input": {}}, "input[0]", "prompt_string or content"),
        ({"input": {"content": "a"}}, "input.content", "expected a list"),
        ({"input": {"prompt_string": "a", "multimodal_data": ["b"]}}, "input[0]", "multimodal_data is not supported"),
        ({"input": {"content": [{"type": "image_url"}]}}, "input[0].content[0].type", "not supported"),
        ({"input": "a", "dimensions": 2}, "dimensions", "3 numbers"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
    ],
    ids=str,
)
async def test_refusals(body: dict[str, Any], field: str, message: str) -> None:
    reply = await post(app_of(embedding_engine()), "/v1/embeddings", body)
    assert reply.status == 400
    assert (reply.json["error"]["param"], message in reply.json["error"]["message"]) == (field, True), reply.json


async def test_the_width_as_dimensions() -> None:
    assert len((await embed(embedding_engine(), {"input": "a", "dimensions": 3}))["data"]) == 1


async def test_the_shape_of_llama_server() -> None:
    vector = [{"index": 0, "embedding": [[2.0, 195.0, 98.0]]}]
    for path in ("/embeddings", "/embedding"):
        assert await embed(embedding_engine(), {"input": "ab", "embd_normalize": -1}, path) == vector
    assert await embed(embedding_engine(), {"content": "ab", "embd_normalize": -1}) == vector
    every_token = await embed(embedding_engine(pooling="none"), {"input": "ab"}, "/embeddings")
    assert every_token == [{"index": 0, "embedding": [[97.0, 0.0, 0.0], [98.0, 0.0, 0.0]]}]


async def test_too_many_vectors_are_refused() -> None:
    engine = embedding_engine(pooling="none", width=2**22)
    reply = await post(app_of(engine), "/embeddings", {"input": ["a", "bc"]})
    assert (reply.status, engine.embedded) == (400, [])
    assert "send at most 2 tokens, or start the server" in reply.json["error"]["message"]
    assert (await post(app_of(engine), "/embeddings", {"input": ["ab"]})).status == 200


async def test_poolings_that_fit_no_reply() -> None:
    unpooled = await post(app_of(embedding_engine(pooling="none")), "/v1/embeddings", {"input": "a"})
    scores = await post(app_of(embedding_engine(pooling="rank")), "/v1/embeddings", {"input": "a"})
    rerank = await post(app_of(embedding_engine()), "/rerank", {"query": "a", "documents": ["b"]})
    assert (unpooled.status, scores.status, rerank.status) == (400, 400, 501)
    assert "pooling of its embeddings is mean" in rerank.json["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/rerank"])
async def test_a_server_without_embeddings(app: ASGIApp, path: str) -> None:
    reply = await post(app, path, {"input": "a", "query": "a", "documents": ["b"]})
    assert (reply.status, reply.json["error"]["type"]) == (501, "not_supported_error")
    assert "Start it with `--" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (-1, [3, -4]),
        (0, [24570, -32760]),
        (1, [3 / 7, -4 / 7]),
        (2, [0.6, -0.8]),
        (3, [3 / 91 ** (1 / 3), -4 / 91 ** (1 / 3)]),
    ],
)
def test_norms(norm: int, expected: list[float]) -> None:
    np.testing.assert_allclose(normalized(np.array([[3, -4]], np.float32), norm), [expected], rtol=1e-6)
    assert normalized(np.zeros((1, 2), np.float32), norm).tolist() == [[0, 0]]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_high_norms_of_extreme_numbers(scale: float) -> None:
    vectors = np.array([[3 * scale, -4 * scale]], np.float32)
    np.testing.assert_allclose(normalized(vectors, 64), [[0.75, -1]], rtol=1e-6)


RERANK = {"query": "q", "documents": ["a", "ccc", "bb"]}


async def test_rerank() -> None:
    engine = embedding_engine(pooling="rank")
    reply = await embed(engine, RERANK, "/v1/rerank")
    assert engine.embedded == [[1, 113, 2, 3, *text, 4] for text in (b"a", b"ccc", b"bb")]
    assert reply["results"] == [
        {"index": 1, "relevance_score": 8.0},
        {"index": 2, "relevance_score": 7.0},
        {"index": 0, "relevance_score": 6.0},
    ]
    assert (reply["object"], reply["model"]) == ("list", "embedder")
    assert reply["usage"] == {"prompt_tokens": 21, "total_tokens": 21}


async def test_rerank_options() -> None:
    engine = embedding_engine(pooling="rank", rerank_template="<s>{query} vs {document}", bos_added=True)
    body = {**RERANK, "documents": [{"text": "a"}, "ccc"], "top_n": 1, "return_documents": True}
    reply = await embed(engine, body, "/reranking")
    assert engine.embedded[0] == [BOS, *b"q vs a"], "only the BOS of the template"
    assert reply["results"] == [{"index": 1, "relevance_score": 9.0, "document": {"text": "ccc"}}]
    await embed(engine, {"query": "{document}", "documents": ["{query}"]}, "/rerank")
    assert engine.embedded[-1] == [BOS, *b"{document} vs {query}"], "placeholders of a text are not replaced"
    tei = {"query": "q", "texts": ["a", "ccc"], "return_text": True}
    assert [each["text"] for each in await embed(engine, tei, "/rerank")] == ["ccc", "a"]
    assert [each["index"] for each in await embed(engine, {**tei, "top_n": 99}, "/rerank")] == [1, 0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": None}, "documents"),
        ({"query": "q", "documents": 123}, "documents"),
        ({"query": "q", "documents": [1, 2]}, "documents[0]"),
        ({"query": "q", "documents": ["a", "b" * 90]}, "documents[1]"),
    ],
    ids=str,
)
async def test_rerank_refusals(body: dict[str, Any], field: str) -> None:
    reply = await post(app_of(embedding_engine(pooling="rank")), "/rerank", body)
    assert (reply.status, reply.json["error"]["param"]) == (400, field)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.bert(tmp_path_factory.mktemp("models") / "bert.gguf")


@pytest.fixture(scope="module")
def server(bert: Path) -> Iterator[Server]:
    with serving("-np", "2", "--embedding-model", str(bert)) as server:
        server.ready()
        yield server
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.timeout(120)
def test_openai_sdk(server: Server) -> None:
    """The SDK asks for base64 and returns floats; a stream runs at the same time."""
    client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1")
    stream = client.completions.create(model="", prompt="One, two, three,", max_tokens=16, stream=True, temperature=0)
    first = next(iter(stream))
    reply = client.embeddings.create(model="bert", input=["a cat", "a dog", "a cat"])
    rest = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert (first.choices[0].text + rest).startswith(" four")
    vectors = [np.array(item.embedding) for item in reply.data]
    assert [len(vector) for vector in vectors] == [tiny_bert.WIDTH] * 3
    np.testing.assert_allclose([vector @ vector for vector in vectors], 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.999
    assert (reply.model, reply.usage.prompt_tokens) == ("bert", 18)
    floats = client.embeddings.create(model="bert", input="a cat", encoding_format="float").data[0].embedding
    np.testing.assert_allclose(floats, vectors[0], atol=1e-6)


@pytest.mark.timeout(120)
def test_servers_of_models_without_text(bert: Path, tmp_path: Path) -> None:
    """A model that computes no text is served with -m, and a reranker with --reranking."""
    with serving("-m", str(bert)) as server:
        url = server.ready()
        assert len(httpx2.post(f"{url}/v1/embeddings", json={"input": "a cat"}).json()["data"]) == 1
        chat = httpx2.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert (chat.status_code, "not text" in chat.json()["error"]["message"]) == (400, True)
        assert all(
            httpx2.get(f"{url}/{path}").status_code == 200 for path in ("props", "slots", "metrics", "v1/models")
        )
        assert httpx2.post(f"{url}/v1/embeddings", json={"input": "a cat " * 99}).status_code == 400
        server.signal()
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)
    reranker = tiny_bert.bert(tmp_path / "reranker.gguf", ranks=True, pooling=PoolingType.RANK)
    with serving("-m", str(reranker), "--reranking") as server:
        reply = httpx2.post(
            f"{server.ready()}/rerank", json={"query": "cat", "documents": ["a cat", "a dog", "x"]}
        ).json()
        scores = [result["relevance_score"] for result in reply["results"]]
        assert scores == sorted(scores, reverse=True)
        assert sorted(result["index"] for result in reply["results"]) == [0, 1, 2]
        assert reply["usage"]["prompt_tokens"] == 3 * (1 + 3 + 1) + 4 + 4 + 1
