"""Checks the metadata of a GGUF for values with which the library would end the process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.contract import ModelError
from engine.llama import library
from engine.llama.gguf_file import gguf_library, opened_gguf

# The first bytes of a GGUF.
_GGUF_MAGIC = b"GGUF"
# The library's `LLAMA_MAX_LAYERS`.
MAX_LAYERS = 512
# Values of `rope.scaling.type`.
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_BLOCKS = "block_count"
_TOKENS = b"tokenizer.ggml.tokens"
# `enum gguf_type`.
_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9


def check_file(path: Path, kind: str = "model") -> None:
    """Raises ModelError, which names the `kind` of file, if `path` is no GGUF or has metadata that would end the
    process."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read the {kind} {path}: {error.strerror}") from None
    if start != _GGUF_MAGIC:
        raise ModelError(f"the {kind} {path} is not a GGUF file: {_describe_start(start)}")
    check_metadata(path, kind)


def _describe_start(start: bytes) -> str:
    """Returns a clause about the first bytes of a file that is not a GGUF."""
    if not start:
        return "the file is empty"
    text = start.decode("ascii", "replace")
    given = f"'{text}'" if text.isascii() and text.isprintable() else f"the bytes {start.hex(' ')}"
    return f"it begins with {given}, not with 'GGUF'"


def check_metadata(path: Path, kind: str) -> None:
    """Raises ModelError, which names the `kind` of file, if the library would end the process while it loads or
    computes the model. Damage that the library itself reports is not checked here."""
    library.initialize()
    with opened_gguf(path) as gguf:
        if gguf and (reason := next(_problems(gguf_library(), gguf), "")):
            raise ModelError(f"the {kind} {path} is damaged: {reason}")


def _problems(lib: Any, gguf: Any) -> Iterator[str]:
    for index in range(lib.gguf_get_n_kv(gguf)):
        name: bytes = lib.gguf_get_key(gguf, index)
        kind: int = lib.gguf_get_kv_type(gguf, index)
        key = name.decode("utf-8", "replace")
        if kind == _UINT32 and name.endswith(b".block_count"):
            blocks: int = lib.gguf_get_val_u32(gguf, index)
            if not 1 <= blocks <= MAX_LAYERS:
                yield f"{key} is {blocks}, not a number of layers from 1 to {MAX_LAYERS}"
        elif kind == _UINT32 and name.endswith(b".nextn_predict_layers"):
            layers, blocks = (
                lib.gguf_get_val_u32(gguf, index),
                _number(gguf, key.replace("nextn_predict_layers", _BLOCKS)),
            )
            if layers > blocks:
                yield f"{key} is {layers}, but the file has {blocks} layers"
        elif kind == _FLOAT32:
            value: float = lib.gguf_get_val_f32(gguf, index)
            if math.isnan(value) or (name.endswith(b"epsilon") and value < 0):
                yield f"{key} is {value}"
        elif kind == _ARRAY and name == _TOKENS and lib.gguf_get_arr_type(gguf, index) == _STRING:
            texts = [lib.gguf_get_arr_str(gguf, index, token) for token in range(lib.gguf_get_arr_n(gguf, index))]
            yield from _repeated_tokens(texts)
            if _is_sentencepiece(lib, gguf):
                yield from _missing_bytes(texts)


def _number(gguf: Any, key: str) -> int:
    """Returns a whole number of the metadata; 0 if there is none."""
    lib = gguf_library()
    index: int = lib.gguf_find_key(gguf, key.encode())
    found = index >= 0 and lib.gguf_get_kv_type(gguf, index) == _UINT32
    return int(lib.gguf_get_val_u32(gguf, index)) if found else 0


def _repeated_tokens(texts: Sequence[bytes]) -> Iterator[str]:
    """Yields a clause for each token with the text of an earlier token. Empty texts may be repeated."""
    if len(set(texts)) == len(texts):
        return
    first: dict[bytes, int] = {}
    for token, text in enumerate(texts):
        if (earlier := first.setdefault(text, token)) != token and text:
            yield f"the tokens {earlier} and {token} have the same text {text.decode('utf-8', 'replace')!r}"


def _is_sentencepiece(lib: Any, gguf: Any) -> bool:
    index: int = lib.gguf_find_key(gguf, b"tokenizer.ggml.model")
    return index >= 0 and lib.gguf_get_kv_type(gguf, index) == _STRING and lib.gguf_get_val_str(gguf, index) == b"llama"


def _missing_bytes(texts: Sequence[bytes]) -> Iterator[str]:
    """Yields a clause if a byte has no token, because a text with this byte would end the process."""
    known = set(texts)
    missing = [byte for byte in range(256) if b"<0x%02X>" % byte not in known and bytes([byte]) not in known]
    if missing:
        yield f"no token has the text <0x{missing[0]:02X}>, which a SentencePiece vocabulary needs for every byte"


def check_overrides(path: Path, overrides: Sequence[str]) -> None:
    """Raises ModelError if a text KEY=TYPE:VALUE would replace metadata of the file by a value with which the library
    ends the process."""
    with opened_gguf(path) as gguf:
        for override in overrides if gguf else ():
            if expected := _expected_override(gguf, override):
                raise ModelError(f"cannot load the model {path}: --override-kv {override}: expected {expected}")


def _expected_override(gguf: Any, override: str) -> str:
    """Returns the values that the key allows; empty if the library accepts the given one."""
    key, _, typed = override.partition("=")
    kind, _, value = typed.partition(":")
    if kind == "float" and (math.isnan(float(value)) or (key.endswith("epsilon") and float(value) < 0)):
        return "a number of at least 0" if key.endswith("epsilon") else "a number"
    if kind == "str" and key.endswith(".rope.scaling.type") and value not in _ROPE_SCALINGS:
        return f"one of {', '.join(_ROPE_SCALINGS)}"
    architecture, _, name = key.partition(".")
    if kind == "int" and (limits := _limits(gguf, architecture, name)) and not limits[0] <= int(value) <= limits[1]:
        least, most = limits
        return f"{least}, as in the file" if least == most else f"a whole number from {least} to {most}"
    return ""


def _limits(gguf: Any, architecture: str, name: str) -> tuple[int, int] | None:
    """Returns the least and the greatest whole number of `architecture.name`. None means that the library checks the
    number itself, or does not read the key for this file."""

    def number(field: str) -> int:
        return _number(gguf, f"{architecture}.{field}")

    if not (blocks := number("block_count")):
        return None
    match name:
        case "block_count":
            return 1, MAX_LAYERS
        case "nextn_predict_layers":
            return 0, blocks - 1
        case "expert_used_count":
            return min(1, number("expert_count")), number("expert_count")
        case "expert_count" | "expert_group_count":  # sizes of the weights
            return number(name), number(name)
        case "rope.dimension_count" if width := number(name) or number("attention.key_length"):
            return width, width
    return None
