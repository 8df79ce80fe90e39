"""Opens a GGUF: model, vocabulary and context, or one clear line about what is wrong with it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.backend import Context, ModelInfo, NativeFault, Progress
from engine.config import EngineConfig, ModelConfig, physical_cores
from engine.contract import ModelError
from engine.llama import exact, fit, library
from engine.llama.context import SEQUENCES, LlamaContext, context_params
from engine.llama.library import text_of
from engine.llama.vocab import LlamaVocab
from engine.memory import Ordered


class LlamaBackend:
    """An opened GGUF. Belongs to the thread that opened it, `vocab` and `info` excepted."""

    def __init__(self, model: Any, vocab: LlamaVocab, context: LlamaContext, info: ModelInfo) -> None:
        self._model = model
        self._native = context
        self.vocab = vocab
        self.context: Context = Ordered(context) if info.exact else context
        self.info = info

    def close(self) -> None:
        """Frees the context, then the model."""
        self._native.close()
        self.vocab.close()
        native.llama_model_free(self._model)


def open_gguf(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> LlamaBackend:
    """Opens `config.model.path`, telling `progress` the share that is loaded and asking `go_on` whether to.

    Raises ModelError, with nothing left in memory.
    """
    path = Path(config.model.path)
    _look_at(path)
    library.start()
    config = _exact(config, path)
    model = _load(config, progress, go_on)
    try:
        return _open(config, path, model)
    except BaseException:
        native.llama_model_free(model)
        raise


def _exact(config: EngineConfig, path: Path) -> EngineConfig:
    """`config` as the deterministic profile has it, if that is asked for. Raises ModelError where it cannot be."""
    try:
        exact.begin(path, exact=config.model.deterministic)
        if not config.model.deterministic:
            return config
        gpu = library.accelerator() if config.model.gpu_layers else ""
        return structs.replace(config, model=exact.exact_config(config.model, gpu))
    except exact.NotExact as reason:
        raise ModelError(f"{path} cannot be served with --deterministic: {reason}") from None


@contextmanager
def open_vocabulary(path: Path) -> Iterator[LlamaVocab]:
    """The vocabulary of a GGUF, without its weights. Raises ModelError."""
    _look_at(path)
    library.start()
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


def _look_at(path: Path) -> None:
    """Raises ModelError unless there is a file that begins like a GGUF."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if start != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it begins with {start!r}, not b'GGUF'")


def _load(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> Any:
    def report(share: float, user_data: object) -> bool:
        progress(share)
        return go_on()

    callback = native.llama_progress_callback(report)
    params = native.llama_model_default_params()
    params.n_gpu_layers = config.model.gpu_layers
    params.progress_callback = callback
    try:
        kept = _place(config.model, params)
    except ValueError as error:
        raise ModelError(f"cannot load the model {config.model.path}: {error}") from None
    if library.amx():
        library.log.warning("llama.cpp was built with AMX, which can crash: weights are not repacked, which is slower")
    params.use_extra_bufts = not (library.amx() or config.model.deterministic)
    model = native.llama_model_load_from_file(config.model.path.encode(), params)
    del kept
    if not model:
        raise ModelError(f"cannot load the model {config.model.path}: {_reason('the library gave no reason')}")
    return model


def _place(config: ModelConfig, params: Any) -> tuple[Any, ...]:
    """Tells `params` which devices have how much of the model, and returns what must live until it is loaded.

    Raises ValueError for devices that there are not, or no proportions.
    """
    chosen, shares = library.devices(config.device), library.split(config.tensor_split)
    if chosen is not None:
        params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    if shares is not None:
        params.tensor_split = shares
    params.split_mode, params.main_gpu = library.SPLIT_MODES[config.split_mode], config.main_gpu
    return chosen, shares


def _reason(otherwise: str) -> str:
    return library.complaint() or otherwise


def _open(config: EngineConfig, path: Path, model: Any) -> LlamaBackend:
    kinds = (native.llama_model_has_encoder, native.llama_model_is_diffusion)
    if any(kind(model) for kind in kinds) or not native.llama_model_has_decoder(model):
        raise ModelError(f"{path} is not a decoder-only language model; Paceline serves only those")
    if config.batch.slots > SEQUENCES - 2:
        raise ModelError(f"llama.cpp decodes at most {SEQUENCES - 2} requests together, not {config.batch.slots}")
    trained: int = native.llama_model_n_ctx_train(model)
    threads = config.model.threads if config.model.threads > 0 else physical_cores()
    gpu = library.accelerator() if config.model.gpu_layers else ""
    heads: int = native.llama_model_n_head(model)

    def params_of(cells: int) -> Any:
        return context_params(config.model, config.batch, cells, threads, heads, bool(gpu))

    library.forget()
    fits = bool(gpu) and config.model.fit == "on" and not config.batch.context
    params = params_of(_fitting(config, model, trained, params_of) if fits else config.batch.context or trained)
    partial = not (native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model))
    window: int = native.llama_model_n_swa(model)
    if config.model.deterministic and (window or not partial):
        raise ModelError(f"{path} cannot be served with --deterministic: its layers do not all see the whole context")
    try:
        context = LlamaContext(model, params, partial=partial, window=window)
    except NativeFault as fault:
        raise ModelError(f"cannot open a context of {params.n_ctx} tokens: {_reason(str(fault))}") from None
    vocab = LlamaVocab(model)
    device = gpu or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    info = _describe(path, model, vocab, context, device)
    types = f"{params.type_k} {params.type_v} {params.flash_attn_type}"
    kind = "exact" if config.model.deterministic else f"moved {config.memory.reuse > 0}"
    layout = f"{info.digest} {info.build} {types} {kind}"
    return LlamaBackend(model, vocab, context, structs.replace(info, layout=layout, exact=config.model.deterministic))


DRAFT_CELLS = 0.25
"""Of the memory left for cells, the share that is kept for those of a draft model on the same GPUs."""


def _fitting(config: EngineConfig, model: Any, trained: int, params_of: Callable[[int], Any]) -> int:
    """The cells for which the GPUs have memory. Raises ModelError if they have too little."""

    def taken(cells: int) -> dict[str, int]:
        before = library.free_memory()
        context = native.llama_init_from_model(model, params_of(cells))
        if not context:
            raise fit.TooLittle(_reason(f"no context of {cells} cells can be opened"))
        after = library.free_memory()
        native.llama_free(context)
        return {device: before[device] - after[device] for device in before}

    draft, reserve, share = config.draft, config.model.fit_target * 2**20, 1.0
    if draft.path and draft.gpu_layers and not draft.device:
        reserve, share = reserve + Path(draft.path).stat().st_size, 1 - DRAFT_CELLS
    try:
        needed = fit.needs(taken)
        found = fit.cells(library.free_memory(), needed, reserve, config.batch.slots * trained)
    except (fit.TooLittle, OSError) as reason:
        raise ModelError(f"cannot fit {config.model.path}: {reason}") from None
    return fit.rounded(share * found)


PIECES, PIECE = 64, 2**20
"""How much of a large model is read for its digest: so many pieces of so many bytes."""


def digest(path: Path) -> str:
    """BLAKE2b of a file's size and content; of a file larger than all pieces, of pieces spread evenly over it."""
    size = path.stat().st_size
    hashed = blake2b(str(size).encode(), digest_size=16)
    step = max(PIECE, (size - PIECE) // (PIECES - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            hashed.update(file.read(PIECE))
    return hashed.hexdigest()


def _describe(path: Path, model: Any, vocab: LlamaVocab, context: LlamaContext, device: str) -> ModelInfo:
    def meta(key: str) -> str:
        return text_of(lambda buffer, size: native.llama_model_meta_val_str(model, key.encode(), buffer, size))

    template: bytes | None = native.llama_model_chat_template(model, None)
    return ModelInfo(
        name=meta("general.name") or path.stem,
        path=str(path),
        description=text_of(lambda buffer, size: native.llama_model_desc(model, buffer, size)),
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
        build=library.build(),
        offloaded=not device.startswith("CPU"),
    )
