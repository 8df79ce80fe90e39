"""Images in the requests of all chat APIs, and the sources and limits of images."""

from __future__ import annotations

import asyncio
import random
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from api.server.app import create_app
from api.templates import media_files, media_urls
from api.templates.media_urls import download_media, is_public
from engine import MAX_MEDIA_BYTES, MediaReader, RequestRefused
from engine.media import without_runs
from tests.api.asgi import CapturedResponse, call, post
from tests.api.fake import FakeEngine, app_state
from tests.engine.test_media import sound
from tests.native.tiny_mmproj import png, png_of
from tests.toy_media import ToyProjector

IMAGE = png()


def data_url(content: bytes = IMAGE) -> str:
    return f"data:image/png;base64,{b64encode(content).decode()}"


def image_engine() -> FakeEngine:
    """Returns an engine whose projector makes ten embeddings of an image, between the tokens 48 and 49."""
    engine = FakeEngine()
    engine.media = MediaReader(ToyProjector(), engine.vocab)
    return engine


def chat(*parts: dict[str, Any] | str) -> dict[str, Any]:
    """Returns the body of a chat with one message, whose parts are texts or objects."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 3}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


async def reply(body: dict[str, Any], engine: FakeEngine | None = None, **config: Any) -> CapturedResponse:
    app = create_app(app_state(engine or image_engine(), **config))
    return await post(app, "/v1/chat/completions", body)


def prompt_of(engine: FakeEngine) -> str:
    """Returns the text of the last request's prompt, with an asterisk in place of each image."""
    request = engine.requests[-1]
    text = list(request.prompt)
    for run in reversed(request.media):
        assert all(token < 0 for token in text[run.start : run.end])
        text[run.start : run.end] = [ord("*")]
    assert len(without_runs(request.prompt, request.media)) + len(request.media) == len(text)
    return bytes(token for token in text if token < 256).decode()


async def test_images_of_a_chat_completion() -> None:
    engine = image_engine()
    body = chat("What is", image(data_url()), "?", "And", image(data_url(png(seed=1))))
    answer = await reply(body, engine)
    assert answer.status == 200, answer.json
    assert prompt_of(engine) == "user\nWhat is0*1?\nAnd0*1\nassistant\n"
    assert answer.json["usage"]["prompt_tokens"] == len(engine.requests[-1].prompt)
    app = create_app(app_state(engine))
    assert (await call(app, "GET", "/props")).json["modalities"] == {"vision": True, "audio": False, "video": False}


async def test_images_of_messages() -> None:
    engine = image_engine()
    source = {"type": "base64", "media_type": "image/png", "data": b64encode(IMAGE).decode()}
    content = [{"type": "text", "text": "What?"}, {"type": "image", "source": source}]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": source}]}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    app = create_app(app_state(engine))
    answer = await post(app, "/v1/messages", {"messages": messages, "max_tokens": 3})
    assert answer.status == 200, answer.json
    assert prompt_of(engine).startswith("user\nWhat?0*1\nassistant\n")
    assert prompt_of(engine).count("0*1") == 2
    count = await post(app, "/v1/messages/count_tokens", {"messages": messages})
    assert count.json["input_tokens"] == len(engine.requests[-1].prompt)


async def test_images_of_responses() -> None:
    engine = image_engine()
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": data_url()}]
    app = create_app(app_state(engine))
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": 3}
    assert (await post(app, "/v1/responses", body)).status == 200
    assert prompt_of(engine) == "user\nWhat?0*1\nassistant\n"
    content[1] = {"type": "input_image", "image_url": data_url(b"x")}
    answer = await post(app, "/v1/responses", body)
    assert (answer.status, answer.json["error"]["param"]) == (400, "input")
    content[1] = {"type": "input_image", "file_id": "file_1"}
    answer = await post(app, "/v1/responses", body)
    assert (answer.status, answer.json["error"]["param"]) == (400, "input[0].content[1].file_id")


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        pytest.param(image(data_url(IMAGE[:-30])), "messages", "damaged", id="broken"),
        pytest.param(image(data_url(png_of(8, 8, bytes(10**7)))), "messages", "more data", id="bomb"),
        pytest.param(image(data_url(png_of(9000, 9000, b""))), "messages", "pixels; at most", id="many-pixels"),
        pytest.param(image(data_url(sound())), "messages", "reads no sounds", id="sound-as-image"),
        pytest.param(image("data:image/png,x"), "messages[0].content[0].image_url", "of the form", id="no-base64"),
        pytest.param(image("data:image/png;base64,?"), "messages[0].content[0].image_url", "base64", id="bad-base64"),
        pytest.param(image("http://1.1.1.1/x"), "messages[0].content[0].image_url", "--media-urls", id="http"),
        pytest.param(image("file:///etc/passwd"), "messages[0].content[0].image_url", "--media-path", id="file"),
        pytest.param(image("ftp://x/y"), "messages[0].content[0].image_url", "'ftp'", id="scheme"),
        pytest.param({"type": "image_url"}, "messages[0].content[0].image_url", "missing", id="no-url"),
        pytest.param(
            {"type": "input_audio", "input_audio": {"data": "AAAA"}},
            "messages[0].content[0].type",
            "audio input is not supported",
            id="audio",
        ),
    ],
)
async def test_refused_parts(part: dict[str, Any], param: str, message: str) -> None:
    answer = await reply(chat(part, "?"))
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert message in answer.json["error"]["message"]


async def test_a_part_that_is_not_supported_beside_images() -> None:
    answer = await reply(chat(image(data_url()), {"type": "refusal"}))
    assert (answer.status, answer.json["error"]["param"]) == (400, "messages[0].content[1].type")


async def test_limits() -> None:
    answer = await reply(chat(*[image(data_url())] * 50))
    assert (answer.status, answer.json["error"]["param"]) == (400, "messages")
    assert "50 images and sounds; at most 16" in answer.json["error"]["message"]
    answer = await reply(chat(image(data_url(bytes(10 * 2**20)))), max_body=2**24)
    assert answer.status == 400
    assert f"at most {MAX_MEDIA_BYTES}" in answer.json["error"]["message"]
    answer = await reply(chat(image(data_url())), FakeEngine())
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith("image input is not supported - hint: ")


async def complete(prompt: Any, engine: FakeEngine | None = None, **config: Any) -> CapturedResponse:
    app = create_app(app_state(engine or image_engine(), **config))
    return await post(app, "/completion", {"prompt": prompt, "n_predict": 3})


def multimodal(text: str, *files: bytes) -> dict[str, Any]:
    return {"prompt_string": text, "multimodal_data": [b64encode(file).decode() for file in files]}


async def test_images_of_completion() -> None:
    engine = image_engine()
    assert (await complete(multimodal("a<__media__>b<__media__>c", IMAGE, png(seed=1)), engine)).status == 200
    assert prompt_of(engine) == "a0*1b0*1c"
    answer = await complete([multimodal("a<__media__>b", IMAGE), "c", [100, "e"], multimodal("f")], engine)
    assert answer.status == 200, answer.json
    assert len(answer.json) == 4
    assert sorted(len(request.media) for request in engine.requests[-4:]) == [0, 0, 0, 1]
    props = await call(create_app(app_state(engine)), "GET", "/props")
    assert props.json["media_marker"] == "<__media__>"


async def test_a_rendered_conversation_is_a_prompt_of_completion() -> None:
    engine, body = image_engine(), chat("What is", image(data_url()), "?")
    assert (await reply(body, engine)).status == 200
    rendered = (await post(create_app(app_state(engine)), "/apply-template", body)).json["prompt"]
    assert (await complete(multimodal(rendered, IMAGE), engine)).status == 200
    assert engine.requests[-1].prompt == engine.requests[-2].prompt


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        pytest.param(multimodal("a", IMAGE), "prompt.multimodal_data", "0 markers <__media__>", id="no-marker"),
        pytest.param([multimodal("<__media__>a", IMAGE[:-30])], "prompt[0].multimodal_data", "damaged", id="broken"),
        pytest.param(
            {"prompt_string": "<__media__>a", "multimodal_data": ["?"]},
            "prompt.multimodal_data[0]",
            "base64",
            id="bad-base64",
        ),
        pytest.param([multimodal("<__media__>" * 9, *[IMAGE] * 9)] * 2, "prompt", "18 images and sounds", id="many"),
    ],
)
async def test_refused_multimodal_data(prompt: Any, param: str, message: str) -> None:
    answer = await complete(prompt)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert message in answer.json["error"]["message"]


async def test_long_base64_is_decoded_in_pieces() -> None:
    content = random.Random(0).randbytes(400_000)
    text = b64encode(content).decode()
    for cut in (len(text), 2**17, 2**17 + 4, 2**18):
        assert await media_files._base64(f"data:,{text[:cut]}", "f", 6) == b64decode(text[:cut])
    for wrong in (text[:-1], text[: 2**17 - 4] + "AA==" + text, text + "é", "AAA=" * 2**17):
        with pytest.raises(RequestRefused, match="valid base64"):
            await media_files._base64(wrong, "f")


async def test_files_below_the_media_path(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.png").write_bytes(IMAGE)
    (tmp_path / "secret.png").write_bytes(IMAGE)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert (await reply(chat(image("file://a/x.png"), "?"), media_path=str(folder))).status == 200
    for name in ("../secret.png", "link.png", "a", "none.png", "a/../../secret.png", f"{tmp_path}/secret.png", "\0"):
        answer = await reply(chat(image(f"file://{name}"), "?"), media_path=str(folder))
        assert (answer.status, "no such file" in answer.json["error"]["message"]) == (400, True), name


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "x"),
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


async def serve_replies(replies: dict[str, bytes]) -> AsyncIterator[str]:
    """Serves the raw HTTP reply of each path on a loopback address, and yields the server's URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(replies[head.split()[1].decode()])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def response(status: str, body: bytes = b"", *headers: str) -> bytes:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
        return "\r\n".join([*lines, "", ""]).encode() + body

    replies = {
        "/x": response("200 OK", IMAGE),
        "/none": response("404 Not Found"),
        "/moved": response("302 Found", b"", "Location: /x"),
        "/loop": response("302 Found", b"", "Location: /loop"),
        "/away": response("302 Found", b"", "Location: http://10.0.0.1/x"),
        "/large": response("200 OK", bytes(MAX_MEDIA_BYTES + 1)),
    }
    async for url in serve_replies(replies):
        with pytest.raises(RequestRefused, match="not on a public network"):
            await download_media(f"{url}/x", "f")
        monkeypatch.setattr(media_urls, "is_public", lambda address: address == "127.0.0.1")
        assert await download_media(f"{url}/x", "f") == IMAGE
        assert await download_media(f"{url}/moved", "f") == IMAGE
        answer = await reply(chat(image(f"{url}/x"), "?"), media_urls=True)
        assert answer.status == 200
        for path, message in (("none", "404"), ("loop", "redirects"), ("away", "public"), ("large", "more than")):
            with pytest.raises(RequestRefused, match=message):
                await download_media(f"{url}/{path}", "f")


async def test_text_like_a_marker_stays_text() -> None:
    engine = image_engine()
    assert (await reply(chat("<__media__> <__media_x__>"), engine)).status == 200
    assert cast("Any", engine.requests[-1]).media == ()
