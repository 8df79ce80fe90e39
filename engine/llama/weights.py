"""Loads the weights of a model. Failures raise ModelError, whose message is one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_cpp import llama_cpp as native

from engine.backend import LoadProgress
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import library
from engine.llama.library import native_log
from engine.llama.placement import set_placement


def load_model(
    config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool], *, mtp: bool = False
) -> Any:
    """Returns the native model of `config.model.path`, with its MTP layers if `mtp`. Calls `progress` with the loaded
    share, and aborts once `keep_loading` returns False. Raises ModelError."""

    def report(share: float, user_data: object) -> bool:
        progress(share)
        return keep_loading()

    callback = native.llama_progress_callback(report)
    params = native.llama_model_default_params()
    params.progress_callback = callback
    params.load_mtp = mtp
    references = set_placement(config.model, config.load, params)
    if library.built_with_amx():
        native_log.warning("llama.cpp was built with AMX, which can crash; weights are not repacked, which is slower")
    model = native.llama_model_load_from_file(config.model.path.encode(), params)
    del references
    if not model:
        reason = library.first_error() or "the library gave no reason"
        raise ModelError(f"cannot load the model {config.model.path}: {reason}")
    return model
