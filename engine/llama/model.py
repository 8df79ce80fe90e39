"""Opens the model, vocabulary and context of a GGUF. Failures raise ModelError, whose message is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.backend import Context, LoadProgress, ModelInfo, NativeFault
from engine.config import EngineConfig, RopeConfig
from engine.contract import ModelError
from engine.llama import exact, fit, layout, library
from engine.llama.adapters import adapter_files, apply_adapters, load_adapters, read_control_vector
from engine.llama.branches import BranchingLlamaContext
from engine.llama.context import LlamaContext
from engine.llama.decoder import NoKVCells
from engine.llama.gguf_check import check_file, check_overrides
from engine.llama.gguf_file import digest
from engine.llama.layout import KvLayout, LayoutInputs
from engine.llama.library import native_log, read_string
from engine.llama.memory_check import check_cells
from engine.llama.mtp import MtpContext
from engine.llama.mtp_head import check_whole, load_head, names_head
from engine.llama.mtp_layer import loads_mtp, model_cell_bytes, mtp_params, mtp_problem, num_layers
from engine.llama.params import (
    MAX_SEQUENCES,
    alternatives_for,
    context_params,
    metadata,
    serving_gpu,
    set_rope,
    trained_tokens,
)
from engine.llama.placement import set_placement
from engine.llama.rollback import snapshots_of
from engine.llama.textless import TextlessContext
from engine.llama.threads import ThreadPools, check_cpus, open_pools, prepare_threads, thread_count
from engine.llama.top_k_chains import enable_selection, open_chains
from engine.llama.vocab import LlamaVocab
from engine.llama.weights import load_model


class LlamaBackend:
    """An opened GGUF. Only the thread that opened it may use it, except `vocab` and `info`."""

    def __init__(
        self,
        model: Any,
        vocab: LlamaVocab,
        context: LlamaContext | TextlessContext,
        info: ModelInfo,
        pools: ThreadPools | None = None,
        head: Any = None,
    ) -> None:
        """`head` is a model with MTP layers for `model`, if they have a file of their own."""
        self.model = model
        self._head = head
        self._pools = pools
        self._context = context
        self.vocab = vocab
        self.context: Context = context
        self.info = info

    def close(self) -> None:
        """Frees the context, the vocabulary and the models."""
        self._context.close()
        native.llama_model_free(self._head)
        if self._pools is not None:
            self._pools.close()
        if self.vocab.close():
            native.llama_model_free(self.model)


def open_gguf(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> LlamaBackend:
    """Opens `config.model.path`. Calls `progress` with the loaded share, and aborts once `keep_loading` returns False.

    Raises ModelError, with nothing left in memory, also if the file of the draft or embedding model is not a GGUF.
    """
    path = Path(config.model.path)
    check_file(path)
    check_whole(path)
    if config.draft.path:  # before the target model is loaded, which can take minutes
        check_file(Path(config.draft.path), "draft model (-md)")
    if config.embedding.path:
        check_file(Path(config.embedding.path), "embedding model (--embedding-model)")
        check_whole(Path(config.embedding.path))
    for file, use in adapter_files(config.adapters):
        check_file(Path(file), use)
    library.initialize()
    _check_settings(config)
    prepare_threads(config.cpu)
    config = _exact(config, path)
    has_head = names_head(config)
    model, head = load_model(config, progress, keep_loading, mtp=loads_mtp(config)), None
    try:
        head = load_head(config, model, keep_loading) if has_head else None
        return _open(config, path, model, head)
    except BaseException:
        native.llama_model_free(head)
        native.llama_model_free(model)
        raise


def _check_settings(config: EngineConfig) -> None:
    """Raises ModelError for settings of threads, positions or loading that are invalid or contradict each other."""
    for each in (config, *([config.for_draft_model(0)] if config.draft.path else ())):
        try:
            check_cpus(each.cpu)
            fit.reserved_bytes(each.model.fit_target, ())
            set_rope(each.rope, native.llama_context_default_params())
            set_placement(each.model, each.load, native.llama_model_default_params())
            check_overrides(Path(each.model.path), each.load.override_kv)
        except ValueError as error:
            raise ModelError(f"cannot load the model {each.model.path}: {error}") from None


def _exact(config: EngineConfig, path: Path) -> EngineConfig:
    """Returns `config`, with the settings of the deterministic profile if `deterministic` is set. Raises ModelError if
    the model or a setting is incompatible with the profile."""
    try:
        exact.prepare(path, exact=config.model.deterministic)
        if not config.model.deterministic:
            return config
        gpu = serving_gpu(config.model)
        return structs.replace(config, model=exact.exact_config(config.model, gpu))
    except exact.NotExact as reason:
        raise ModelError(f"{path} cannot be served with --deterministic: {reason}") from None


def _open(config: EngineConfig, path: Path, model: Any, head: Any) -> LlamaBackend:
    is_encoder_decoder = native.llama_model_has_encoder(model) and native.llama_model_has_decoder(model)
    if is_encoder_decoder or native.llama_model_is_diffusion(model):
        raise ModelError(f"{path} is neither a decoder-only language model nor a model for embeddings")
    if not native.llama_model_n_layer(model):
        raise ModelError(f"the model {path} is damaged: by its metadata all layers are MTP layers")
    kind = _kind(model)
    if config.model.deterministic and kind:
        raise ModelError(f"{path} cannot be served with --deterministic: the model is {kind}")
    adapters = load_adapters(model, config.adapters, path, exact=config.model.deterministic)
    vector = read_control_vector(model, config.adapters)
    threads, gpu = thread_count(config.cpu, config.model.threads), serving_gpu(config.model)
    heads: int = native.llama_model_n_head(model)
    trained_context = trained_tokens(config.rope, model)

    recurrent = kind in ("recurrent", "hybrid")
    free = sum(library.free_gpu_memory().values()) if gpu else layout.free_memory()

    def params_of(chosen: KvLayout) -> Any:
        params = context_params(config.model, config.batch, chosen, threads, heads, bool(gpu), recurrent=recurrent)
        set_rope(config.rope, params)
        params.n_rs_seq = snapshots_of(config, model, params, free).kept if recurrent else 0
        return params

    library.clear_errors()
    mtp = head or (model if _has_usable_layers(config, model) else None)
    bytes_per_cell = model_cell_bytes(config, model, mtp)
    chosen = _layout(config, model, mtp, kind, gpu, trained_context, params_of)
    check_cells(config.model, model, chosen.cells, kind, bytes_per_cell, gpu=bool(gpu))
    params = params_of(chosen)
    context = _open_context(config, model, mtp, params, kind)
    pools = open_pools(config.cpu, params.n_threads, params.n_threads_batch)
    if isinstance(context, LlamaContext):
        if pools is not None:
            context.attach(pools)
        apply_adapters(context, adapters, vector)
    elif adapters or vector:
        raise ModelError(f"{path} computes embeddings only, to which neither --lora nor --control-vector applies")
    vocab = LlamaVocab(model)
    device = gpu or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    info = _describe(path, model, vocab, context, device)
    info = structs.replace(
        info,
        trained_context=trained_context,
        layout=f"{info.digest} {info.build} {_state_settings(config, params, context)}"
        + (f" control {vector.digest}" if vector else ""),
        exact=config.model.deterministic,
        kv_unified=chosen.unified,
        kv_reason=chosen.reason,
        adapters=tuple(each.info for each in adapters),
        cell_bytes=bytes_per_cell if isinstance(context, LlamaContext) else 0,
        no_drafts=snapshots_of(config, model, params, free).reason if recurrent else "",
    )
    return LlamaBackend(model, vocab, context, info, pools, head)


def _has_usable_layers(config: EngineConfig, model: Any) -> bool:
    """Returns True if MTP layers of `model` were loaded and can be used; False, with a warning in the log, if they
    cannot be used."""
    if not loads_mtp(config):
        return False
    if problem := mtp_problem(model, Path(config.model.path)):
        native_log.warning("MTP is off: %s", problem)
    return not problem


def _open_context(config: EngineConfig, model: Any, mtp: Any, params: Any, kind: str) -> LlamaContext | TextlessContext:
    """Returns a new context, which is a TextlessContext if the model computes embeddings only. `mtp` is the model with
    MTP layers that draft, or None. Raises ModelError."""
    try:
        if native.llama_model_has_decoder(model):
            partial, window = kind not in ("recurrent", "hybrid"), native.llama_model_n_swa(model)
            chains = open_chains(config.model, model, params, config.batch.num_slots)
            shifting = config.memory.reuse > 0 and not config.model.deterministic
            branches = alternatives_for(config.batch.num_slots, params, partial=partial, window=window)
            if mtp:
                context: LlamaContext = MtpContext(model, mtp, params, chains, partial=partial, window=window)
            elif branches and chains is None:  # branches have no chains
                context = BranchingLlamaContext(model, params, branches, shifting=shifting)
            else:
                context = LlamaContext(model, params, chains, partial=partial, window=window, shifting=shifting)
            if chains is not None:
                enable_selection(config.model, context, chains)
            return context
    except NoKVCells:
        native_log.debug("%s computes embeddings only", config.model.path)
    except NativeFault as fault:
        raise ModelError(f"cannot open a context of {params.n_ctx} tokens: {library.first_error() or fault}") from None
    return TextlessContext(config.batch.num_slots)


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
    changes = [] if config.rope == RopeConfig() else [repr(config.rope)]
    changes += sorted(config.load.override_kv)
    changes += ["full windows"] if config.model.swa_full else []
    head = digest(Path(config.draft.path)) if config.draft.path else "own"
    changes += [f"MTP layers {context.max_draft or 1} {head}"] if isinstance(context, MtpContext) else []
    changes += ["numbered"] if isinstance(context, LlamaContext) and context.numbers_states else []
    return " ".join([f"{params.type_k} {params.type_v} {params.flash_attn_type} {kind}{whole}", *changes])


def _layout(
    config: EngineConfig,
    model: Any,
    mtp: Any,
    kind: str,
    gpu: str,
    trained_context: int,
    params_of: Callable[[KvLayout], Any],
) -> KvLayout:
    """Returns the KV layout and its number of cells. Raises ModelError if --fit finds too little memory or the slots
    exceed the library's limit."""
    batch = config.batch
    unified = True if batch.slot_context and config.model.kv_unified is None else config.model.kv_unified
    cells = batch.context or batch.num_slots * batch.slot_context
    inputs = LayoutInputs(unified, batch.num_slots, cells, trained_context, kind, slots_given=batch.slots > 0)
    if gpu and config.model.fit == "on" and not inputs.cells:
        inputs = inputs._replace(cells=_fitting_cells(config, model, mtp, trained_context, params_of), fitted=True)
    if not inputs.cells:
        free = sum(library.free_gpu_memory().values()) if gpu else layout.free_memory()
        inputs = inputs._replace(memory_cells=int(layout.MEMORY_SHARE * free) // model_cell_bytes(config, model, mtp))
    chosen = layout.choose_layout(inputs)
    limit = MAX_SEQUENCES - 2 if chosen.unified else MAX_SEQUENCES
    if config.batch.num_slots > limit:
        raise ModelError(f"llama.cpp decodes at most {limit} requests together, not {config.batch.num_slots}")
    return chosen._replace(reason="--deterministic requires it") if config.model.deterministic else chosen


# Fraction of the fitting cells that is not allocated if a draft model's cells are on the same GPUs.
DRAFT_CELLS_SHARE = 0.25


def _fitting_cells(
    config: EngineConfig, model: Any, mtp: Any, trained_context: int, params_of: Callable[[KvLayout], Any]
) -> int:
    """Returns the number of cells that fit the free memory of the GPUs. Raises ModelError if no context fits."""

    def measure(cells: int) -> dict[str, int]:
        before = library.free_gpu_memory()
        chosen = KvLayout(True, cells, "")
        context = native.llama_init_from_model(model, params_of(chosen))
        if not context:
            raise fit.TooLittleMemory(library.first_error() or f"no context of {cells} cells can be opened")
        of_layer = mtp_params(params_of(chosen), context, num_layers(mtp))
        contexts = num_layers(mtp) or bool(mtp)
        opened = [context, *(native.llama_init_from_model(mtp, of_layer) for _ in range(contexts))]
        after = library.free_gpu_memory()
        for each in opened:
            native.llama_free(each)
        return {device: before[device] - after[device] for device in before}

    draft, reserve, share = config.draft, 0, 1.0
    if draft.path and not mtp and draft.gpu_layers and not draft.device:
        reserve, share = reserve + Path(draft.path).stat().st_size, 1 - DRAFT_CELLS_SHARE
    if config.embedding.path and config.model.gpu_layers:
        reserve += Path(config.embedding.path).stat().st_size
    try:
        uses = fit.measure_memory(measure)
        limit = config.batch.num_slots * trained_context
        free = library.free_gpu_memory()
        reserved = {name: size + reserve for name, size in fit.reserved_bytes(config.model.fit_target, free).items()}
        found = fit.fitting_cells(free, uses, reserved, limit, round(config.model.fit_context / share))
    except (fit.TooLittleMemory, OSError) as reason:
        raise ModelError(f"cannot fit {config.model.path}: {reason}") from None
    return layout.round_down(share * found)


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
        longest_token=vocab.longest_token,
        generates=isinstance(context, LlamaContext),
    )
