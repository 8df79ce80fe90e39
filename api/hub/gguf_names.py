"""The quantization and the part number in names of GGUF files, and llama-server's choice among files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE)
_QUANT = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)
# Quantizations chosen without `:quant`, in order of preference. Any model file comes last.
DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
# Substrings in the names of GGUF files other than language models.
_OTHER_FILES = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")


class GgufName(NamedTuple):
    """The parts of a GGUF's name: `user/model-Q4_K_M-00001-of-00003.gguf`."""

    prefix: str
    """The path without the part number and `.gguf`."""
    quant: str
    """The quantization in capitals; empty if the name has none."""
    part: int
    parts: int
    """Number of files of the model; 1 for a model in one file."""


def parse_gguf_name(path: str) -> GgufName:
    """Returns the parts of a GGUF's path.

    >>> parse_gguf_name("a/model-q4_k_m-00001-of-00003.gguf")
    GgufName(prefix='a/model-q4_k_m', quant='Q4_K_M', part=1, parts=3)
    """
    prefix, part, parts = path.removesuffix(".gguf"), 1, 1
    if (found := _PART.fullmatch(prefix)) and 1 <= int(found[2]) <= int(found[3]):
        prefix, part, parts = found[1], int(found[2]), int(found[3])
    quant = _QUANT.search(prefix)
    return GgufName(prefix, quant[1].upper() if quant else "", part, parts)


def is_model(path: str) -> bool:
    """True for the first or only file of a language model: no projector, importance matrix or draft head."""
    name = path.rpartition("/")[2]
    return path.endswith(".gguf") and not any(word in name for word in _OTHER_FILES) and parse_gguf_name(path).part == 1


def choose_model(paths: Iterable[str], quant: str = "") -> str | None:
    """Returns the first or only file of the model with the quantization `quant`, compared without case.

    An empty `quant` means the first of `DEFAULT_QUANTS` that exists, else the first model. None means no match.
    """
    models = [path for path in paths if is_model(path)]
    for wanted in (quant,) if quant else DEFAULT_QUANTS:
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        if found := next(filter(pattern.search, models), None):
            return found
    return None if quant else next(iter(models), None)


def choose_projector(paths: Iterable[str], quant: str = "") -> str | None:
    """Returns the projector with the quantization `quant`, else that of F16, else the first. None if there is none."""
    projectors = [path for path in paths if path.endswith(".gguf") and "mmproj" in path.rpartition("/")[2].lower()]
    for wanted in (quant, "F16"):
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        if wanted and (found := next(filter(pattern.search, projectors), None)):
            return found
    return next(iter(projectors), None)


def choose_head(paths: Iterable[str], model: str, quant: str = "") -> str | None:
    """Returns the file with MTP layers for `model`; None if there is none. A file in the model's folder precedes those
    in folders above. Of one folder it is the file with the quantization `quant`, else with the closest number of bits.
    """
    folders, bits = model.split("/")[:-1], _bits(quant or parse_gguf_name(model).quant)

    def rank(path: str) -> tuple[int, bool, int]:
        exact = bool(quant) and f"-{quant}.".upper() in path.upper()
        return -path.count("/"), not exact, abs(_bits(parse_gguf_name(path).quant) - bits)

    heads = [path for path in paths if path.endswith(".gguf") and "mtp-" in path]
    return min((path for path in heads if (own := path.split("/")[:-1]) == folders[: len(own)]), key=rank, default=None)


def _bits(quant: str) -> int:
    found = re.search(r"\d+", quant)
    return int(found[0]) if found else 0


def files_of(paths: Iterable[str], first: str) -> tuple[str, ...]:
    """Returns the paths of all files of the model whose first or only file is `first`, in order."""
    model = parse_gguf_name(first)
    if model.parts == 1:
        return (first,)
    names = {path: parse_gguf_name(path) for path in paths if path.endswith(".gguf")}
    same = (path for path, name in names.items() if (name.prefix, name.parts) == (model.prefix, model.parts))
    return tuple(sorted(same, key=lambda path: names[path].part))


def all_parts(url: str) -> tuple[str, ...]:
    """Returns the URLs of all files of the model whose first or only file is at `url`."""
    model = parse_gguf_name(url)
    if model.parts == 1:
        return (url,)
    return tuple(f"{model.prefix}-{index:05}-of-{model.parts:05}.gguf" for index in range(1, model.parts + 1))


def quants_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Returns the quantizations of the models among `paths`, without repetition."""
    return tuple(
        dict.fromkeys(name.quant for path in paths if is_model(path) and (name := parse_gguf_name(path)).quant)
    )


def split_repository(name: str) -> tuple[str, str]:
    """Returns the repository and the quantization of `user/model[:quant]`; the second is empty without `:`."""
    repository, _, quant = name.partition(":")
    return repository, quant


def missing_parts(files: Sequence[str]) -> int:
    """Returns the number of files that are missing among `files`, the files of one model."""
    return parse_gguf_name(files[0]).parts - len(files)
