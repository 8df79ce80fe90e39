"""GGUFs with metadata that would end the process, as model and as draft model, and contexts larger than the memory."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import layout, open_gguf
from engine.llama.gguf_check import check_file
from engine.llama.memory_check import too_many_cells
from tests.native import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.windowed(tmp_path_factory.mktemp("models") / "whole.gguf", 0)


def damaged(whole: Path, target: Path, key: str, value: bytes, item: int = 0) -> Path:
    """Writes `whole` with another value of a field, or of one item of an array, that has as many bytes."""
    reader = GGUFReader(whole)
    field = reader.fields[key]
    part = field.parts[field.data[item]]
    assert part.nbytes == len(value)
    content, start = bytearray(whole.read_bytes()), part.ctypes.data - reader.data.ctypes.data
    content[start : start + len(value)] = value
    target.write_bytes(content)
    return target


EPSILON = "gemma3.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize(
    ("key", "value", "item", "reason"),
    [
        ("tokenizer.ggml.tokens", b"$", 36, r"the tokens 36 and 39 have the same text '\$'"),
        (
            "gemma3.block_count",
            struct.pack("<I", 0),
            0,
            r"gemma3\.block_count is 0, not a number of layers from 1 to 512",
        ),
        ("gemma3.block_count", struct.pack("<I", 2**32 - 1), 0, r"gemma3\.block_count is 4294967295"),
        (EPSILON, struct.pack("<f", float("nan")), 0, rf"{re.escape(EPSILON)} is nan"),
        (EPSILON, struct.pack("<f", -1.0), 0, rf"{re.escape(EPSILON)} is -1\.0"),
    ],
)
def test_metadata_that_would_end_the_process(
    whole: Path, tmp_path: Path, key: str, value: bytes, item: int, reason: str
) -> None:
    path = str(damaged(whole, tmp_path / "damaged.gguf", key, value, item))
    for config, kind in (
        (EngineConfig.of(path=path), "model"),
        (EngineConfig.of(path=whole, draft={"path": path}), r"draft model \(-md\)"),
    ):
        with pytest.raises(ModelError, match=f"the {kind} {re.escape(path)} is damaged: {reason}"):
            open_gguf(config, lambda share: None, lambda: True)


def test_a_sentencepiece_vocabulary_without_a_byte(tmp_path: Path) -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    for name, texts in (("whole", tokens), ("damaged", [token.replace("<0x41>", "<0xZZ>") for token in tokens])):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    check_file(tmp_path / "whole.gguf")
    with pytest.raises(ModelError, match="no token has the text <0x41>, which a SentencePiece vocabulary needs"):
        check_file(tmp_path / "damaged.gguf")


def test_a_context_larger_than_the_free_memory(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "free_memory", lambda: 2 * 10**6)
    config = EngineConfig.of(path=whole, slots=1, context=2**20)
    fits = r"1048576 tokens need 0\.5 GB, and 0\.0 GB are free; -c (\d+) would fit"
    with pytest.raises(ModelError, match=fits) as error:
        open_gguf(config, lambda share: None, lambda: True)
    context = int(str(error.value).partition("-c ")[2].partition(" ")[0])
    open_gguf(EngineConfig.of(path=whole, slots=1, context=context), lambda share: None, lambda: True).close()


def test_the_number_of_cells_that_fit() -> None:
    assert too_many_cells(1000, 100.0, 100_000) == ""
    assert "-c 768 would fit" in too_many_cells(1001, 100.0, 100_000)
