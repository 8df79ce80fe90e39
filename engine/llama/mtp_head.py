"""MTP layers in a GGUF of their own (`-md mtp-model.gguf`), which lacks the other layers of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native

from engine.config import EngineConfig
from engine.contents import model_files
from engine.contract import ModelError
from engine.llama.gguf_file import read_text, tensor_types
from engine.llama.mtp_layer import CELL_READERS, mtp_problem
from engine.llama.params import metadata
from engine.llama.weights import load_model

# The library, too, recognises a file with all layers of a model by this tensor.
_FIRST_LAYER = "blk.0.attn_norm.weight"
# Architectures of other heads, with which as a draft model the library would end the process.
_UNSUPPORTED = ("eagle3", "dflash")
_UNSUPPORTED_REASON = (
    "its input is that of several layers of the model, which llama.cpp's C API does not return; use a draft model, or "
    "MTP layers"
)


def names_head(config: EngineConfig) -> bool:
    """Returns True if the MTP layers of the file of `-md` draft: it has no other layers, or `--spec-type` names
    `draft-mtp` and not `draft`. Raises ModelError if `--spec-type` excludes the only layers of the file, or names
    layers that the file lacks."""
    path, types = config.draft.path, {*config.speculation.default_types}
    architecture = read_text(Path(path), "general.architecture") if path else ""
    if architecture in _UNSUPPORTED:
        raise ModelError(f"the draft model (-md) {path} is of the architecture {architecture}: {_UNSUPPORTED_REASON}")
    has_layers, only_layers = _mtp_layers(Path(path)) if path else (False, False)
    if only_layers and not types & {"auto", "draft-mtp"}:
        raise ModelError(f"the draft model (-md) {path} has MTP layers only: use --spec-type draft-mtp or auto")
    if not path or "draft-mtp" not in types or "draft" in types:
        return only_layers
    if not has_layers:
        raise ModelError(f"the draft model (-md) {path} has no MTP layers: use --spec-type draft or auto")
    return True


def check_whole(path: Path) -> None:
    """Raises ModelError if a model has MTP layers only, with which the library would end the process."""
    if _mtp_layers(path)[1]:
        raise ModelError(f"{path} has only the MTP layers of a model: give that model, and this file as -md")


def _mtp_layers(path: Path) -> tuple[bool, bool]:
    """Returns whether a file has MTP layers, and whether it has no other layers."""
    names = [name for part in model_files(path) for name in tensor_types(part)]
    has_layers = any("nextn." in name for name in names)
    reads_cells = read_text(path, "general.architecture") in CELL_READERS
    return has_layers, reads_cells or (has_layers and _FIRST_LAYER not in names)


def load_head(config: EngineConfig, model: Any, keep_loading: Callable[[], bool]) -> Any:
    """Returns the native model of the file of `-md`, whose MTP layers draft for `model`. Raises ModelError, with
    nothing left in memory."""
    head = load_model(config.for_draft_model(0), lambda share: None, keep_loading, mtp=True)
    if problem := mtp_problem(head, Path(config.draft.path)) or _mismatch(model, head):
        native.llama_model_free(head)
        raise ModelError(f"the MTP layers of {config.draft.path} cannot draft: {problem}")
    return head


def _mismatch(model: Any, head: Any) -> str:
    """Returns the first difference because of which the layers of `head` do not fit `model`; empty if they fit."""

    def vocabulary(of: Any) -> int:
        return int(native.llama_vocab_n_tokens(native.llama_model_get_vocab(of)))

    family = metadata(head, "general.architecture")
    values = {
        "architecture": [CELL_READERS.get(family, family), metadata(model, "general.architecture")],
        "width": [native.llama_model_n_embd_out(each) for each in (head, model)],
        "size of the vocabulary": [vocabulary(each) for each in (head, model)],
    }
    different = ((name, own, other) for name, (own, other) in values.items() if own != other)
    return next((f"they are for the {name} {own}, the model's is {other}" for name, own, other in different), "")
