"""Loads LoRA adapters and control vectors. Failures raise ModelError, whose message is one line.

Files are checked before the library reads them. In llama.cpp 0c1e57098 these adapters would end the process: metadata
of another type, a rank that differs between the two parts of a token embedding, an adapted token embedding that is
also the output, and parts for experts that do not have one matrix for each expert.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native

from engine.adapters import AdapterInfo, default_set
from engine.backend import NativeFault
from engine.config import AdapterConfig
from engine.contract import ModelError
from engine.llama import library
from engine.llama.decoder import Decoder
from engine.llama.exact import REFUSED_WEIGHT_TYPES
from engine.llama.gguf_file import tensor_types
from engine.llama.params import metadata

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_EMBEDDING = "token_embd.weight"
_INTEGER_TYPES = ("i8", "i16", "i32", "i64", "f64")


class LoadedAdapter(NamedTuple):
    """An adapter in the model's memory. The library frees it with the model."""

    handle: Any
    info: AdapterInfo


class ControlVector(NamedTuple):
    """The sum of all control vectors, [layers from 1 on, width], and the first and last layer to which it is added."""

    directions: np.ndarray[Any, np.dtype[np.float32]]
    start: int
    end: int

    @property
    def digest(self) -> str:
        """A digest of the numbers and the layers."""
        return blake2b(self.directions.tobytes() + f"{self.start} {self.end}".encode(), digest_size=16).hexdigest()


class _AdapterFile(NamedTuple):
    path: str
    scale: float
    flag: str


def adapter_files(config: AdapterConfig) -> list[tuple[str, str]]:
    """Returns the path of each configured file, with its kind and flag for errors. Raises ModelError for a scale that
    is not a number."""
    lora = [(file.path, f"LoRA adapter ({file.flag})") for file in _lora_files(config)]
    return lora + [(file.path, f"control vector ({file.flag})") for file in _vector_files(config)]


def _lora_files(config: AdapterConfig) -> list[_AdapterFile]:
    return [_AdapterFile(path, 1.0, "--lora") for path in config.lora] + [
        _scaled(text, "--lora-scaled") for text in config.lora_scaled
    ]


def _vector_files(config: AdapterConfig) -> list[_AdapterFile]:
    return [_AdapterFile(path, 1.0, "--control-vector") for path in config.control_vector] + [
        _scaled(text, "--control-vector-scaled") for text in config.control_vector_scaled
    ]


def _scaled(text: str, flag: str) -> _AdapterFile:
    path, _, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise ModelError(f"{flag}: expected a file and a number, such as adapter.gguf:0.5, not {text!r:.200}")
    return _AdapterFile(path, number, flag)


# ── LoRA adapters ──


def load_adapters(model: Any, config: AdapterConfig, model_path: Path, *, exact: bool) -> list[LoadedAdapter]:
    """Loads the adapters of `config` into `model`. Must be called before a context of the model is opened, because the
    library sizes the graph of a context by the adapters loaded before. With `exact`, adapters must suit the
    deterministic profile. Raises ModelError."""
    files = _lora_files(config)
    if exact and len(files) > 1:
        raise ModelError("--deterministic allows one LoRA adapter, as the order in which several are added varies")
    tied = bool(files) and "output.weight" not in tensor_types(model_path)
    experts = metadata(model, f"{metadata(model, 'general.architecture')}.expert_count")
    check = partial(_check_tensors, tied=tied, experts=int(experts or 0), exact=exact)
    loaded: list[LoadedAdapter] = []
    for number, file in enumerate(files):
        with _reading(file.path) as reader:
            texts = _check_metadata(reader)
            check(reader.tensors)
        library.clear_errors()
        handle = native.llama_adapter_lora_init(model, file.path.encode())
        if not handle:
            raise ModelError(f"cannot apply the LoRA adapter {file.path}: {_library_reason()}")
        with Path(file.path).open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: blake2b(digest_size=16)).hexdigest()
        scale = 0.0 if config.unapplied else file.scale
        info = AdapterInfo(id=number, path=file.path, scale=scale, digest=digest, **texts)
        loaded.append(LoadedAdapter(handle, info))
    return loaded


def _library_reason() -> str:
    return library.first_error().rpartition("lora adapter: ")[2] or "the library gave no reason"


class _Unusable(Exception):
    """The file cannot be used. The message is a clause."""


@contextmanager
def _reading(path: str) -> Iterator[GGUFReader]:
    """Opens the reader of a GGUF. A damaged file, and an _Unusable in the block, become ModelErrors."""
    from gguf import GGUFReader  # takes 0.1 s, and most servers have no adapters

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises many kinds of exceptions for damaged files
        raise ModelError(f"{path} is not a readable GGUF: {str(error) or type(error).__name__}") from None
    try:
        yield reader
    except _Unusable as error:
        raise ModelError(f"cannot use {path}: {error}") from None


def _check_metadata(reader: GGUFReader) -> dict[str, str]:
    """Returns the texts of an AdapterInfo. Raises _Unusable."""
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (given := _text(reader, key)) != wanted:
            raise _Unusable(f"its {key} is {given!r:.64}, not {wanted!r}; convert it with convert_lora_to_gguf.py")
    if not _text(reader, "general.architecture"):
        raise _Unusable("it names no general.architecture")
    alpha = reader.get_field("adapter.lora.alpha")
    if alpha is not None and [kind.name for kind in alpha.types] != ["FLOAT32"]:
        raise _Unusable("its adapter.lora.alpha is not a 32-bit float")
    if reader.get_field("adapter.alora.invocation_tokens") is not None:
        raise _Unusable("it is an activated adapter (aLoRA), which applies to a part of a prompt only; use a LoRA")
    return {name: _text(reader, f"adapter.lora.{name}") for name in ("task_name", "prompt_prefix")}


def _text(reader: GGUFReader, key: str) -> str:
    """Returns a text of the metadata; empty if the key is missing or has another type."""
    field = reader.get_field(key)
    return str(field.contents()) if field is not None and [kind.name for kind in field.types] == ["STRING"] else ""


def _check_tensors(tensors: Sequence[ReaderTensor], *, tied: bool, experts: int, exact: bool) -> None:
    """Raises _Unusable for tensors with which the library would end the process or break the deterministic profile.
    The library checks all else. `tied` is True if the token embedding is also the output."""
    parts = {tensor.name: [int(size) for size in tensor.shape] for tensor in tensors}
    for tensor in tensors:
        name, kind = tensor.name.removesuffix(".lora_a").removesuffix(".lora_b"), tensor.tensor_type.name.lower()
        shape = parts[tensor.name]
        wanted = [experts] if "_exps" in name else []
        if name != tensor.name and (shape[2:] != wanted or len(shape) < 2):
            raise _Unusable(f"{tensor.name} has the shape {shape}; this model needs {2 + len(wanted)} dimensions")
        if kind in _INTEGER_TYPES:
            raise _Unusable(f"{tensor.name} has the type {kind}")
        if exact and kind in REFUSED_WEIGHT_TYPES:
            raise _Unusable(f"{tensor.name} is {kind}, whose kernel for a single row breaks --deterministic; use q8_0")
    pair = [parts.get(f"{_EMBEDDING}.lora_{part}", [0]) for part in "ab"]
    if pair != [[0], [0]] and tied:
        raise _Unusable("it adapts the token embedding, which is also the output of this model")
    if pair[0][0] != pair[1][0]:
        raise _Unusable(f"the parts of {_EMBEDDING} have different ranks")


# ── control vectors ──


def read_control_vector(model: Any, config: AdapterConfig) -> ControlVector | None:
    """Returns the sum of the control vectors of `config`, multiplied by their factors; None if there are none. Raises
    ModelError."""
    files = _vector_files(config)
    if not files:
        return None
    width: int = native.llama_model_n_embd(model)
    layers: int = native.llama_model_n_layer(model)
    start, end = config.control_vector_layers or (0, 0)
    start, end = start if start > 0 else 1, end if end > 0 else layers
    if start > end:
        raise ModelError(f"--control-vector-layer-range: the first layer, {start}, is after the last one, {end}")
    total = np.zeros((max(1, layers - 1), width), np.float32)
    for file in files:
        with _reading(file.path) as reader:
            for layer, direction in _directions(reader, width):
                if layer <= len(total):
                    total[layer - 1] += direction * np.float32(file.scale)
    return ControlVector(total, start, end)


def _directions(reader: GGUFReader, width: int) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Yields each layer with its direction. Raises _Unusable."""
    if not reader.tensors:
        raise _Unusable("it has no directions")
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        if prefix != "direction" or not (number.isascii() and number.isdecimal() and int(number)):
            raise _Unusable(f"its tensor {tensor.name!r:.64} is not named direction.N with a layer N of 1 or more")
        if tensor.tensor_type.name != "F32" or [int(size) for size in tensor.shape] != [width]:
            raise _Unusable(f"{tensor.name} must be {width} numbers of type F32, as wide as the model's rows")
        yield int(number), np.asarray(tensor.data, np.float32)


def apply_adapters(context: Decoder, adapters: Sequence[LoadedAdapter], vector: ControlVector | None) -> None:
    """Applies the control vector, and the default set of adapters until another set is applied. Raises ModelError."""
    context.adapters = [each.handle for each in adapters]
    context.set_adapters(default_set(each.info for each in adapters))
    if vector is None:
        return
    try:
        context.add_control_vector(vector.directions, vector.start, vector.end)
    except NativeFault:
        raise ModelError(f"the control vector cannot be applied: {library.first_error()}") from None
