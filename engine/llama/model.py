"""Opens the model, vocabulary and context of a GGUF. Failures raise ModelError, whose message is one line."""

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
from engine.llama.decoder import NoKVCells
from engine.llama.layout import KvLayout, LayoutInputs
from engine.llama.library import native_log, read_string
from engine.llama.params import MAX_SEQUENCES, cell_bytes, context_params, metadata
from engine.llama.textless import TextlessContext
from engine.llama.vocab import LlamaVocab

# The first bytes of a GGUF.
_GGUF_MAGIC = b"GGUF"


class LlamaBackend:
    """An opened GGUF. Only the thread that opened it may use it, except `vocab` and `info`."""

    def __init__(self, model: Any, vocab: LlamaVocab, context: LlamaContext | TextlessContext, info: ModelInfo) -> None:
        self.model = model
        self._context = context
        self.vocab = vocab
        self.context: Context = context
        self.info = info

    def close(self) -> None:
        """Frees the context, the vocabulary and the model."""
        self._context.close()
        self.vocab.close()
        native.llama_model_free(self.model)


def open_gguf(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> LlamaBackend:
    """Opens `config.model.path`. Calls `progress` with the loaded share, and aborts once `keep_loading` returns False.

    Raises ModelError, with nothing left in memory, also if the file of the draft or embedding model is not a GGUF.
    """
    path = Path(config.model.path)
    _check_file(path)
    if config.draft.path:  # before the target model is loaded, which can take minutes
        _check_file(Path(config.draft.path), "draft model (-md)")
    if config.embedding.path:
        _check_file(Path(config.embedding.path), "embedding model (--embedding-model)")
    library.initialize()
    config = _exact(config, path)
    model = load_model(config, progress, keep_loading)
    try:
        return _open(config, path, model)
    except BaseException:
        native.llama_model_free(model)
        raise


def _exact(config: EngineConfig, path: Path) -> EngineConfig:
    """Returns `config`, with the settings of the deterministic profile if `deterministic` is set. Raises ModelError if
    the model or a setting is incompatible with the profile."""
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
    """Opens the vocabulary of a GGUF without loading weights. Raises ModelError."""
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


def _check_file(path: Path, kind: str = "model") -> None:
    """Raises ModelError, which names the `kind` of file, if `path` is not a file with the magic number of GGUF."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read the {kind} {path}: {error.strerror}") from None
    if start != _GGUF_MAGIC:
        raise ModelError(f"the {kind} {path} is not a GGUF file: {_describe_start(start)}")


def _describe_start(start: bytes) -> str:
    """Returns a clause about the first bytes of a file that is not a GGUF."""
    if not start:
        return "the file is empty"
    text = start.decode("ascii", "replace")
    given = f"'{text}'" if text.isascii() and text.isprintable() else f"the bytes {start.hex(' ')}"
    return f"it begins with {given}, not with 'GGUF'"


def load_model(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> Any:
    """Returns the native model of `config.model.path`. Raises ModelError."""

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
    """Sets the devices and their shares of the model in `params`. Returns the arrays that must live until the model is
    loaded. Raises ValueError for unknown devices or wrong shares.
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
    has_encoder, has_decoder = native.llama_model_has_encoder(model), native.llama_model_has_decoder(model)
    if (has_encoder and has_decoder) or native.llama_model_is_diffusion(model):
        raise ModelError(f"{path} is neither a decoder-only language model nor a model for embeddings")
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
    context: LlamaContext | TextlessContext = TextlessContext(config.batch.slots)
    try:
        if has_decoder:
            context = LlamaContext(model, params, partial=partial, window=window, shifting=shifting)
    except NoKVCells:
        native_log.debug("%s computes embeddings only", path)
    except NativeFault as fault:
        raise ModelError(f"cannot open a context of {params.n_ctx} tokens: {_reason(str(fault))}") from None
    vocab = LlamaVocab(model)
    device = gpu or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    info = _describe(path, model, vocab, context, device)
    info = structs.replace(
        info,
        layout=f"{info.digest} {info.build} {_state_settings(config, params, context)}",
        exact=config.model.deterministic,
        kv_unified=chosen.unified,
        kv_reason=chosen.reason,
    )
    return LlamaBackend(model, vocab, context, info)


def _kind(model: Any) -> str:
    """Returns `recurrent`, `hybrid` or `sliding-window`; empty if all layers attend to the whole context."""
    if native.llama_model_is_recurrent(model):
        return "recurrent"
    if native.llama_model_is_hybrid(model):
        return "hybrid"
    return "sliding-window" if native.llama_model_n_swa(model) else ""


def _state_settings(config: EngineConfig, params: Any, context: LlamaContext | TextlessContext) -> str:
    """Returns the settings on which saved states depend. They are equal for both KV layouts if states are divisible."""
    kind = "exact" if config.model.deterministic else f"moved {config.memory.reuse > 0}"
    whole = "" if context.divisible or context.unified else f" {context.streams} streams"
    return f"{params.type_k} {params.type_v} {params.flash_attn_type} {kind}{whole}"


def _layout(config: EngineConfig, model: Any, kind: str, gpu: str, params_of: Callable[[KvLayout], Any]) -> KvLayout:
    """Returns the KV layout and its number of cells. Raises ModelError if --fit finds too little memory or the slots
    exceed the library's limit."""
    trained_context: int = native.llama_model_n_ctx_train(model)
    inputs = LayoutInputs(config.model.kv_unified, config.batch.slots, config.batch.context, trained_context, kind)
    if gpu and config.model.fit == "on" and not inputs.cells:
        inputs = inputs._replace(cells=_fitting_cells(config, model, trained_context, params_of), fitted=True)
    if not inputs.cells:
        free = sum(library.free_memory().values()) if gpu else layout.free_memory()
        inputs = inputs._replace(memory_cells=int(layout.MEMORY_SHARE * free) // cell_bytes(config.model, model))
    chosen = layout.choose_layout(inputs)
    limit = MAX_SEQUENCES - 2 if chosen.unified else MAX_SEQUENCES
    if config.batch.slots > limit:
        raise ModelError(f"llama.cpp decodes at most {limit} requests together, not {config.batch.slots}")
    return chosen._replace(reason="--deterministic requires it") if config.model.deterministic else chosen


# Fraction of the fitting cells that is not allocated if a draft model's cells are on the same GPUs.
DRAFT_CELLS_SHARE = 0.25


def _fitting_cells(config: EngineConfig, model: Any, trained_context: int, params_of: Callable[[KvLayout], Any]) -> int:
    """Returns the number of cells that fit the free memory of the GPUs. Raises ModelError if no context fits."""

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
    if config.embedding.path and config.model.gpu_layers:
        reserve += Path(config.embedding.path).stat().st_size
    try:
        uses = fit.measure_memory(measure)
        found = fit.fitting_cells(library.free_memory(), uses, reserve, config.batch.slots * trained_context)
    except (fit.TooLittleMemory, OSError) as reason:
        raise ModelError(f"cannot fit {config.model.path}: {reason}") from None
    return fit.round_down(share * found)


# Number of samples of a large model's file that enter its digest, and the bytes of each sample.
DIGEST_SAMPLES, SAMPLE_BYTES = 64, 2**20


def digest(path: Path) -> str:
    """Returns a BLAKE2b digest of a file's size and content. Of a file larger than all samples together, only evenly
    spaced samples are read."""
    size = path.stat().st_size
    hashed = blake2b(str(size).encode(), digest_size=16)
    step = max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (DIGEST_SAMPLES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()


def _describe(
    path: Path, model: Any, vocab: LlamaVocab, context: LlamaContext | TextlessContext, device: str
) -> ModelInfo:
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
        fim=vocab.fim,
        generates=isinstance(context, LlamaContext),
    )
