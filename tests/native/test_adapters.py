"""LoRA adapters and control vectors on the real model."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from llama_cpp import llama_cpp as native

from engine import AdapterScale, Engine, EngineConfig, ModelError, Request, SamplingParams
from engine.adapters import AdapterSet
from engine.llama import library, open_gguf
from engine.llama.decoder import Decoder
from engine.llama.model import LlamaBackend
from tests.conftest import MODEL
from tests.native.test_engine import collect
from tests.native.tiny_adapter import RANK, WIDTH, adapter, control_vector

DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, "
TOKENS = 8
# With these sets the most likely token leads by 0.8 or more in each step, so that last bits of logits change no token.
A, B = (AdapterScale(0, 1.0),), (AdapterScale(0, 0.5), AdapterScale(1, -1.0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [*(adapter(folder / f"{seed}.gguf", seed) for seed in (1, 3)), control_vector(folder / "vector.gguf", 3)]


class BareContext:
    """A context of its own over a model that the test loads, as small programs use the library."""

    def __init__(self, files: list[Path]) -> None:
        library.initialize()
        params = native.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = native.llama_model_load_from_file(str(MODEL).encode(), params)
        self.vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model))
        self.adapters = [native.llama_adapter_lora_init(self.model, str(file).encode()) for file in files]
        settings = native.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 2, 2
        settings.flash_attn_type = 0
        self.context = native.llama_init_from_model(self.model, settings)

    def greedy(self, prompt: tuple[int, ...], adapters: AdapterSet) -> list[int]:
        native.llama_memory_clear(native.llama_get_memory(self.context), False)
        handles = [self.adapters[each.id] for each in adapters]
        array: Any = (native.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*(each.scale for each in adapters))
        native.llama_set_adapters_lora(self.context, array, len(handles), scales)
        tokens, rows = list[int](), list(prompt)
        for _ in range(TOKENS):
            given = (native.llama_token * len(rows))(*rows)
            assert native.llama_decode(self.context, native.llama_batch_get_one(given, len(rows))) == 0
            logits = np.ctypeslib.as_array(native.llama_get_logits(self.context), (self.vocabulary,))
            rows = [int(logits.argmax())]
            tokens += rows
        return tokens


@pytest.fixture(scope="module")
def prompt(shared_backend: LlamaBackend) -> tuple[int, ...]:
    return tuple(shared_backend.vocab.tokenize(2 * DAYS + "Monday, Tuesday", special=False))


@pytest.fixture(scope="module")
def expected(files: list[Path], prompt: tuple[int, ...]) -> Iterator[dict[AdapterSet, list[int]]]:
    """Yields the tokens of each set, from a context that has no other set meanwhile."""
    bare = BareContext(files[:2])
    yield {each: bare.greedy(prompt, each) for each in ((), A, B)}
    native.llama_free(bare.context)
    native.llama_model_free(bare.model)


def greedy(prompt: tuple[int, ...], adapters: AdapterSet | None) -> Request:
    sampling = SamplingParams(temperature=0.0)
    return Request(prompt=prompt, max_tokens=TOKENS, sampling=sampling, ignore_eos=True, adapters=adapters)


async def test_interleaved_requests_have_the_tokens_of_their_adapters(
    files: list[Path], prompt: tuple[int, ...], expected: dict[AdapterSet, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in expected.values()}) == 3, "the adapters change the tokens"
    lora = {"lora": (str(files[0]),), "lora_scaled": (f"{files[1]}:0.5",), "unapplied": True}
    config = EngineConfig.of(path=MODEL, slots=4, context=2048, calibrate=False, warmup=False, adapters=lora)
    async with Engine.open(config) as engine:
        sets: list[AdapterSet] = [(), A, B, A]
        results = await asyncio.gather(*(collect(engine, greedy(prompt, each)) for each in sets))
        assert [tokens for tokens, *_ in results] == [expected[each] for each in sets]
        again = await asyncio.gather(*(collect(engine, greedy(prompt, each)) for each in (A, (), B)))
        assert [tokens for tokens, *_ in again] == [expected[each] for each in (A, (), B)]
        assert all(end.usage.cached > 0 for *_, end in again), "each set has its own prefix"
        assert (await collect(engine, greedy(prompt, None)))[0] == expected[()]
        engine.adapters.set_scales({0: 1.0})
        assert (await collect(engine, greedy(prompt, None)))[0] == expected[A]


def test_a_control_vector_changes_the_logits_and_the_layout_of_states(files: list[Path], backend: LlamaBackend) -> None:
    adapters: dict[str, object] = {"control_vector": (str(files[2]),)}
    config = EngineConfig.of(path=MODEL, slots=4, context=1024, rows=256, adapters=adapters)
    steered = open_gguf(config, lambda share: None, lambda: True)
    assert isinstance(steered.context, Decoder)
    rows: list[np.ndarray[Any, Any]] = []
    for context in (backend.context, steered.context, steered.context):
        if len(rows) == 2:
            steered.context.add_control_vector(np.zeros((29, WIDTH), np.float32), 1, 30)
        context.cut(0, 0)
        context.batch.clear()
        context.batch.add(0, 0, [1, 2, 3], 1)
        rows.append(context.decode()[0].copy())
    assert steered.info.layout.startswith(f"{backend.info.layout} control ")
    steered.close()
    assert np.abs(rows[1] - rows[0]).max() > 0.1
    assert np.array_equal(rows[2], rows[0])


def write(path: Path, tensors: dict[str, tuple[int, ...]], *, kind: str = "adapter", alpha: Any = 1.0) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    (writer.add_float32 if isinstance(alpha, float) else writer.add_uint32)("adapter.lora.alpha", alpha)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUERY = "blk.0.attn_q.weight.lora_"
GOOD: dict[str, tuple[int, ...]] = {f"{QUERY}a": (RANK, WIDTH), f"{QUERY}b": (WIDTH, RANK)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "model"}, "its general.type is 'model', not 'adapter'"),
        ({"alpha": 1}, "adapter.lora.alpha is not a 32-bit float"),
        ({"tensors": {f"{QUERY}a": (3, RANK, WIDTH), f"{QUERY}b": (WIDTH, RANK)}}, "has the shape"),
        ({"tensors": {f"{QUERY}a": (RANK, 2 * WIDTH), f"{QUERY}b": (WIDTH, RANK)}}, "incorrect shape"),
        ({"tensors": {f"{QUERY}a": (RANK, WIDTH)}}, "missing one component"),
        ({"tensors": {"token_embd.weight.lora_a": (4, 4), "token_embd.weight.lora_b": (4, 4)}}, "also the output"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "adapter.gguf", **{"tensors": GOOD, **settings})
    config = EngineConfig.of(path=MODEL, slots=1, context=256, adapters={"lora": (str(path),)})
    with pytest.raises(ModelError, match=reason) as caught:
        open_gguf(config, lambda share: None, lambda: True)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ({"lora": ("missing.gguf",)}, r"cannot read the LoRA adapter \(--lora\) missing.gguf: No such file"),
        ({"lora_scaled": ("x.gguf:half",)}, "--lora-scaled: expected a file and a number"),
        ({"control_vector": ("adapter.gguf",)}, "not named direction.N"),
        ({"control_vector": ("vector.gguf",), "control_vector_layers": (3, 2)}, "the first layer, 3, is after"),
        ({"control_vector": ("narrow.gguf",)}, "must be 576 numbers of type F32"),
    ],
    ids=["missing", "scale", "names", "layers", "width"],
)
def test_wrong_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("adapter.gguf"), GOOD)
    control_vector(Path("vector.gguf"), 1)
    control_vector(Path("narrow.gguf"), 1, width=8)
    config = EngineConfig.of(path=MODEL, slots=1, context=256, adapters=adapters)
    with pytest.raises(ModelError, match=reason):
        open_gguf(config, lambda share: None, lambda: True)
