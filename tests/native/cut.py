"""Smaller or slightly different copies of a GGUF, for draft models that are poor or do not fit the target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderField

# Fields that the writer adds.
_WRITER_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


def cut(source: Path, target: Path, layers: int, respelled: Mapping[int, str] | None = None) -> Path:
    """Writes the first `layers` layers of a llama model to `target`, with the texts of some tokens replaced."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name not in _WRITER_FIELDS:
            value = _value(name, field, layers, respelled or {})
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _value(name: str, field: ReaderField, layers: int, respelled: Mapping[int, str]) -> object:
    if name == "llama.block_count":
        return layers
    if name == "tokenizer.ggml.tokens":
        return [respelled.get(token, text) for token, text in enumerate(field.contents())]
    assert field.types[0] is not GGUFValueType.ARRAY or field.contents(), "an array has values"
    return field.contents()
