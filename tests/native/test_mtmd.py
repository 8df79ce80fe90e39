"""Images with random projectors and a random model. The tests need a build with mtmd (`make serve VISION=1`)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine import (
    Engine,
    EngineConfig,
    ModelError,
    Request,
    SamplingParams,
    Speculation,
    Tokens,
    has_media_library,
)
from engine.contract import ProposerType
from engine.step import EngineCore
from tests.native.test_engine import answer
from tests.native.tiny import WIDTH, windowed, with_mtp, with_mtp_layers
from tests.native.tiny_mmproj import ProjectorKind, png, projector

if not has_media_library():
    pytest.skip("llama-cpp-python was built without mtmd: make serve VISION=1", allow_module_level=True)

KINDS = ["janus_pro", "gemma3"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model and one projector of each kind."""
    folder = tmp_path_factory.mktemp("projectors")
    windowed(folder / "model.gguf", 0)
    for kind in KINDS:
        projector(folder / f"{kind}.gguf", WIDTH, kind)  # type: ignore[arg-type]
    return folder


@asynccontextmanager
async def opened(files: Path, kind: str, **fields: Any) -> AsyncIterator[Engine]:
    """Opens the model with a projector."""
    settings = {"slots": 4, "context": 2048, "calibrate": False, "threads": 1, "flash_attention": "on", **fields}
    config = EngineConfig.of(path=files / "model.gguf", media={"path": str(files / f"{kind}.gguf")}, **settings)
    async with Engine.open(config) as engine:
        yield engine


def image_request(engine: Engine, *images: int, **fields: Any) -> Request:
    """Returns a request whose prompt has one random image for each seed of `images`."""
    assert engine.media is not None
    shown = " and ".join([engine.media.marker] * len(images))
    text = f"<|im_start|>user\nLook at this: {shown}! Describe it.<|im_end|>\n<|im_start|>assistant\n"
    prompt = engine.media.read(text, [png(seed=seed) for seed in images])
    return Request(prompt=prompt.tokens, media=prompt.runs, sampling=SamplingParams(temperature=0.0), **fields)


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_do_not_depend_on_layout_speculation_or_cached_prefixes(files: Path, kind: ProjectorKind) -> None:
    found: list[list[list[int]]] = []
    for unified in (True, False):
        async with opened(files, kind, kv_unified=unified) as engine:
            plain = Speculation(type=())
            requests = [image_request(engine, seed, max_tokens=12, speculation=plain) for seed in range(2)]
            alone = [await answer(engine, request) for request in requests]
            requests = [image_request(engine, seed, max_tokens=12, salt="together") for seed in (0, 1, 0, 1)]
            together = await asyncio.gather(*(answer(engine, request) for request in requests))
            again, end = await answer(engine, image_request(engine, 0, max_tokens=12))
            assert end.usage.cached >= len(image_request(engine, 0).prompt) - 2, "a second turn computes no image"
            outputs = [ids for ids, _ in (*alone, *together)] + [again]
            assert outputs == [outputs[0], outputs[1], outputs[0], outputs[1], outputs[0], outputs[1], outputs[0]]
            found.append(outputs[:2])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1], "the output depends on the image"


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("type", ["draft", "draft-mtp"])
async def test_drafts_after_an_image_change_no_token(
    files: Path, tmp_path: Path, type: ProposerType, unified: bool
) -> None:
    model = with_mtp_layers(tmp_path / "model.gguf")
    draft = {"path": str(model) if type == "draft" else ""}
    shutil.copy(files / "janus_pro.gguf", tmp_path)
    async with opened(tmp_path, "janus_pro", kv_unified=unified, draft=draft, cache_type_v="bf16") as engine:
        texts = []
        for drafts in (Speculation(type=()), Speculation(type=(type,), n_max=4, order="fixed")):
            requests = [image_request(engine, seed, max_tokens=30, speculation=drafts) for seed in range(2)]
            texts.append(await asyncio.gather(*(answer(engine, request) for request in requests)))
        plain, drafted = texts
        assert [ids for ids, _ in plain] == [ids for ids, _ in drafted]
        assert all(end.usage.accepted for _, end in drafted)


async def test_a_preempted_request_decodes_its_images_again(files: Path) -> None:
    def preempt(core: EngineCore) -> None:
        for sequence in [*core.running.values()]:
            core.lifecycle.preempt(sequence, keep=False)

    async with opened(files, "janus_pro", kv_unified=False, memory={"ram": 0}) as engine:
        request = image_request(engine, 0, 1, max_tokens=40)
        wanted, _ = await answer(engine, request)
        ids: list[int] = []
        async with engine.generate(image_request(engine, 0, 1, max_tokens=40, salt="other")) as updates:
            async for update in updates:
                ids += update.ids if isinstance(update, Tokens) else ()
                if not engine.stats().preemptions:
                    await engine.query(preempt)
        assert ids == wanted
        assert engine.stats().preemptions == 1


async def test_projectors_that_cannot_be_served(files: Path, tmp_path: Path) -> None:
    projector(tmp_path / "wide.gguf", 2 * WIDTH)
    windowed(tmp_path / "model.gguf", 0)
    with pytest.raises(ModelError, match="mismatch between text model"):
        async with opened(tmp_path, "wide"):
            pass
    with pytest.raises(ModelError, match="--deterministic"):
        async with opened(files, "janus_pro", deterministic=True, flash_attention="auto"):
            pass
    config = EngineConfig.of(path=with_mtp(tmp_path / "glm.gguf"), media={"path": str(files / "janus_pro.gguf")})
    with pytest.raises(ModelError, match="takes no images with models of the architecture glm4moe"):
        async with Engine.open(config):
            pass
    (tmp_path / "cut.gguf").write_bytes((files / "janus_pro.gguf").read_bytes()[:-10])
    with pytest.raises(ModelError, match="is incomplete"):
        async with opened(tmp_path, "cut"):
            pass
    projector(tmp_path / "large.gguf", WIDTH, "gemma3", image_size=96)
    with pytest.raises(ModelError, match="--ubatch-size and --batch-size to 36 or more"):
        async with opened(tmp_path, "large", ubatch=32):
            pass


async def test_odd_sizes_of_images(files: Path) -> None:
    async with opened(files, "janus_pro") as engine:
        assert engine.media is not None
        for width, height in ((1, 1), (1, 100), (100, 1), (2, 3), (500, 20)):
            prompt = engine.media.read(f"{engine.media.marker}.", [png(width, height)])
            request = Request(prompt=prompt.tokens, media=prompt.runs, max_tokens=1)
            assert len((await answer(engine, request))[0]) == 1
