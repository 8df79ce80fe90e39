"""Opens a GGUF: model, vocabulary and context. Failures raise ModelError, whose message is one line."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.backend import Context, LoadProgress, ModelInfo, NativeFault
from engine.config import EngineConfig, ModelConfig, physical_cores
from engine.contract import ModelError
from engine.llama import exact, fit, layout, library
from engine.llama.context import LlamaContext
from engine.llama.layout import KvLayout, LayoutInputs
from engine.llama.library import native_log, read_string
from engine.llama.params import MAX_SEQUENCES, cell_bytes, context_params, metadata
from engine.llama.vocab import LlamaVocab


class LlamaBackend:
    """An opened GGUF. Belongs to the thread that opened it, except `vocab` and `info`."""

    def __init__(self, model: Any, vocab: LlamaVocab, context: LlamaContext, info: ModelInfo) -> None:
        self._model = model
        self._context = context
        self.vocab = vocab
        self.context: Context = context
        self.info = info

    def close(self) -> None:
        """Frees the context, then the model."""
        self._context.close()
        self.vocab.close()
        native.llama_model_free(self._model)


def open_gguf(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> LlamaBackend:
    """Opens `config.model.path`. Calls `progress` with the loaded share, and stops once `keep_loading` returns False.

    Raises ModelError, with nothing left in memory.
    """
    path = Path(config.model.path)
    _check_file(path)
    library.initialize()
    config = _exact(config, path)
    model = _load(config, progress, keep_loading)
    try:
        return _open(config, path, model)
    except BaseException:
        native.llama_model_free(model)
        raise


def _exact(config: EngineConfig, path: Path) -> EngineConfig:
    """Returns `config`, with the settings of the deterministic profile if requested. Raises ModelError."""
    try:
        exact.prepare(path, exact=config.model.deterministic)
        if not config.model.deterministic:
            return config
        gpu = library.gpu_name() if config.model.gpu_layers else ""
        return structs.replace(config, model=exact.exact_config(config.model, gpu))
    except exact.NotExact as reason:
        raise ModelError(f"{path} cannot be served with --deterministic: {reason}") from None


@contextmanager
def open_vocabulary(path: Path) -> Iterator[LlamaVocab]:
    """Opens the vocabulary of a GGUF, without its weights. Raises ModelError."""
    _check_file(path)
    library.initialize()
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(f"cannot load the vocabulary of {path}: {_reason('the library gave no reason')}")
    vocab = LlamaVocab(model)
    try:
        yield vocab
    finally:
        vocab.close()
        native.llama_model_free(model)


def _check_file(path: Path) -> None:
    """Raises ModelError if `path` is not a file with the magic number of GGUF."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if start != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it begins with {start!r}, not b'GGUF'")


def _load(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Any:
    def report(share: float, user_data: object) -> bool:
        progress(share)
        return keep_loading()

    callback = native.llama_progress_callback(report)
    params = native.llama_model_default_params()
    params.n_gpu_layers = config.model.gpu_layers
    params.progress_callback = callback
    try:
        references = _set_devices(config.model, params)
    except ValueError as error:
        raise ModelError(f"cannot load the model {config.model.path}: {error}") from None
    if library.built_with_amx():
        native_log.warning("llama.cpp was built with AMX, which can crash; weights are not repacked, which is slower")
    params.use_extra_bufts = not (library.built_with_amx() or config.model.deterministic)
    model = native.llama_model_load_from_file(config.model.path.encode(), params)
    del references
    if not model:
        raise ModelError(f"cannot load the model {config.model.path}: {_reason('the library gave no reason')}")
    return model


def _set_devices(config: ModelConfig, params: Any) -> tuple[Any, ...]:
    """Sets the devices and their shares in `params`. Returns the objects that must live until the model is loaded.

    Raises ValueError for unknown devices or wrong shares.
    """
    chosen, shares = library.parse_devices(config.device), library.parse_tensor_split(config.tensor_split)
    if chosen is not None:
        params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    if shares is not None:
        params.tensor_split = shares
    params.split_mode, params.main_gpu = library.SPLIT_MODES[config.split_mode], config.main_gpu
    return chosen, shares


def _reason(default: str) -> str:
    return library.first_error() or default


def _open(config: EngineConfig, path: Path, model: Any) -> LlamaBackend:
    kinds = (native.llama_model_has_encoder, native.llama_model_is_diffusion)
    if any(kind(model) for kind in kinds) or not native.llama_model_has_decoder(model):
        raise ModelError(f"{path} is not a decoder-only language model; Paceline serves only those")
    kind, window = _kind(model), native.llama_model_n_swa(model)
    if config.model.deterministic and kind:
        raise ModelError(f"{path} cannot be served with --deterministic: the model is {kind}")
    threads = config.model.threads if config.model.threads > 0 else physical_cores()
    gpu = library.gpu_name() if config.model.gpu_layers else ""
    heads: int = native.llama_model_n_head(model)

    def params_of(chosen: KvLayout) -> Any:
        return context_params(config.model, config.batch, chosen, threads, heads, bool(gpu))

    library.clear_errors()
    chosen = _layout(config, model, kind, gpu, params_of)
    params = params_of(chosen)
    partial = kind not in ("recurrent", "hybrid")
    shifting = config.memory.reuse > 0 and not config.model.deterministic
    try:
        context = LlamaContext(model, params, partial=partial, window=window, shifting=shifting)
    except NativeFault as fault:
        raise ModelError(f"cannot open a context of {params.n_ctx} tokens: {_reason(str(fault))}") from None
    vocab = LlamaVocab(model)
    device = gpu or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    info = _describe(path, model, vocab, context, device)
    info = structs.replace(
        info,
        layout=f"{info.digest} {info.build} {_states(config, params, context)}",
        exact=config.model.deterministic,
        kv_unified=chosen.unified,
        kv_reason=chosen.reason,
    )
    each = f"{context.cells} cells" if chosen.unified else f"{context.sequence_cells} cells for each slot"
    native_log.info("%s KV, %s: %s", "unified" if chosen.unified else "per-slot", each, chosen.reason)
    return LlamaBackend(model, vocab, context, info)


def _kind(model: Any) -> str:
    """Returns the kind of a model with layers that do not attend to the whole context; empty for other models."""
    if native.llama_model_is_recurrent(model):
        return "recurrent"
    if native.llama_model_is_hybrid(model):
        return "hybrid"
    return "sliding-window" if native.llama_model_n_swa(model) else ""


def _states(config: EngineConfig, params: Any, context: LlamaContext) -> str:
    """Returns the types and settings that saved states depend on: equal for both KV layouts if states are divisible."""
    kind = "exact" if config.model.deterministic else f"moved {config.memory.reuse > 0}"
    whole = "" if context.divisible or context.unified else f" {context.streams} streams"
    return f"{params.type_k} {params.type_v} {params.flash_attn_type} {kind}{whole}"


def _layout(config: EngineConfig, model: Any, kind: str, gpu: str, params_of: Callable[[KvLayout], Any]) -> KvLayout:
    """Returns the KV layout and its cells. Raises ModelError if --fit finds too little memory."""
    trained: int = native.llama_model_n_ctx_train(model)
    inputs = LayoutInputs(config.model.kv_unified, config.batch.slots, config.batch.context, trained, kind)
    if gpu and config.model.fit == "on" and not inputs.cells:
        inputs = inputs._replace(cells=_fitting(config, model, trained, params_of), fitted=True)
    if not inputs.cells:
        free = sum(library.free_memory().values()) if gpu else layout.free_memory()
        inputs = inputs._replace(room=int(layout.MEMORY_SHARE * free) // cell_bytes(config.model, model))
    chosen = layout.choose_layout(inputs)
    limit = MAX_SEQUENCES - 2 if chosen.unified else MAX_SEQUENCES
    if config.batch.slots > limit:
        raise ModelError(f"llama.cpp decodes at most {limit} requests together, not {config.batch.slots}")
    return chosen._replace(reason="--deterministic needs it") if config.model.deterministic else chosen


# Share of the cells' memory that is reserved for the cells of a draft model on the same GPUs.
DRAFT_CELLS_SHARE = 0.25


def _fitting(config: EngineConfig, model: Any, trained: int, params_of: Callable[[KvLayout], Any]) -> int:
    """Returns the cells that fit the memory of the GPUs. Raises ModelError if they have too little."""

    def measure(cells: int) -> dict[str, int]:
        before = library.free_memory()
        context = native.llama_init_from_model(model, params_of(KvLayout(True, cells, "")))
        if not context:
            raise fit.TooLittleMemory(_reason(f"no context of {cells} cells can be opened"))
        after = library.free_memory()
        native.llama_free(context)
        return {device: before[device] - after[device] for device in before}

    draft, reserve, share = config.draft, config.model.fit_target * 2**20, 1.0
    if draft.path and draft.gpu_layers and not draft.device:
        reserve, share = reserve + Path(draft.path).stat().st_size, 1 - DRAFT_CELLS_SHARE
    try:
        uses = fit.measure_memory(measure)
        found = fit.fitting_cells(library.free_memory(), uses, reserve, config.batch.slots * trained)
    except (fit.TooLittleMemory, OSError) as reason:
        raise ModelError(f"cannot fit {config.model.path}: {reason}") from None
    return fit.round_down(share * found)


# Samples of a large model's file that its digest covers, and the bytes of each.
DIGEST_SAMPLES, SAMPLE_BYTES = 64, 2**20


def digest(path: Path) -> str:
    """Returns BLAKE2b of a file's size and content; of evenly spread samples if the file is larger than all samples."""
    size = path.stat().st_size
    hashed = blake2b(str(size).encode(), digest_size=16)
    step = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (DIGEST_SAMPLES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()


def _describe(path: Path, model: Any, vocab: LlamaVocab, context: LlamaContext, device: str) -> ModelInfo:
    template: bytes | None = native.llama_model_chat_template(model, None)
    return ModelInfo(
        name=metadata(model, "general.name") or path.stem,
        path=str(path),
        description=read_string(lambda buffer, size: native.llama_model_desc(model, buffer, size)),
        bytes=native.llama_model_size(model),
        parameters=native.llama_model_n_params(model),
        vocabulary=vocab.size,
        trained_context=native.llama_model_n_ctx_train(model),
        context=context.cells,
        device=device,
        chat_template=template.decode("utf-8", "replace") if template else None,
        bos=vocab.bos,
        eos=vocab.eos,
        bos_added=vocab.adds_bos,
        digest=digest(path),
        build=library.build_info(),
        offloaded=not device.startswith("CPU"),
    )
