"""Embeddings: a context of its own that computes pooled vectors, over the weights of the model or of a second one.

Some wrong calls abort the process instead of returning an error, and are checked here before the library is called:
more rows than `n_batch` or `n_ubatch`, and an input beyond the training context of a model with learnt positions. An
input must fit one ubatch, as the library pools the rows of each ubatch separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native
from msgspec import structs

from engine.backend import Aborted, Backend, Embedding, EmbeddingInfo, NativeFault, RerankMarks
from engine.batch import Batch
from engine.config import EngineConfig, LoadConfig, Pooling
from engine.contract import ModelError
from engine.llama import exact, library
from engine.llama.decoder import native_batch
from engine.llama.gguf_file import tensor_types
from engine.llama.layout import PAD_CELLS
from engine.llama.library import FLASH_ATTENTION
from engine.llama.model import LlamaBackend
from engine.llama.params import resolve_flash_attention, serving_gpu, set_rope
from engine.llama.threads import thread_count
from engine.llama.vocab import LlamaVocab
from engine.llama.weights import load_model

# Maximum tokens of one input unless the configuration has a number: the scores of one layer stay below 1 GiB.
DEFAULT_LIMIT = 2048
# Maximum inputs of one decode.
MAX_INPUTS = 64

# `enum llama_pooling_type`.
_POOLING_TYPES: dict[Pooling, int] = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
_POOLING_NAMES = {number: name for name, number in _POOLING_TYPES.items()}
_UNSPECIFIED = -1


class LlamaEmbedding:
    """Implements `engine.backend.EmbeddingBackend`."""

    def __init__(self, model: Any, vocab: LlamaVocab, path: Path, params: Any, *, owned: bool) -> None:
        """`owned` is True if `close` frees the model and the vocabulary. Raises NativeFault, with the model kept."""
        self._model, self._owned = model, owned
        self._handle = native.llama_init_from_model(model, params)
        if not self._handle:
            raise NativeFault("the context could not be created")
        self._memory = native.llama_get_memory(self._handle)
        self._compute = native.llama_encode if native.llama_model_has_encoder(model) else native.llama_decode
        self._stop = library.StopFlag()
        self._stop.install(self._handle)
        self._batch = Batch(params.n_ubatch)
        self._native_batch, self._batch_arrays = native_batch(self._batch)
        self.vocab = vocab
        self.sequences: int = params.n_seq_max
        self.info = _describe(model, vocab, path, _POOLING_NAMES[native.llama_pooling_type(self._handle)], params)

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[Embedding]:
        """Returns the vectors of each input. Raises Aborted or NativeFault."""
        self._fill(inputs)
        if self._memory:
            native.llama_memory_clear(self._memory, False)
        match self._compute(self._handle, self._native_batch):
            case 0:
                return self._vectors(inputs)
            case 2:
                raise Aborted
            case code:
                raise NativeFault(f"the library returned {code} for {self._batch.rows} rows")

    def _fill(self, inputs: Sequence[Sequence[int]]) -> None:
        """Sets the rows of the batch. Raises NativeFault for inputs that would end the process."""
        lengths = [len(tokens) for tokens in inputs]
        if not 0 < len(inputs) <= self.sequences or not all(lengths) or sum(lengths) > self.info.limit:
            raise NativeFault(f"inputs of {lengths} tokens do not fit a batch of {self.info.limit} rows")
        if not all(0 <= min(tokens) <= max(tokens) < self.vocab.size for tokens in inputs):
            raise NativeFault("an input has a token id outside the vocabulary")
        self._batch.clear()
        for seq, tokens in enumerate(inputs):
            self._batch.add(seq, 0, tokens, len(tokens))
        self._native_batch.n_tokens = self._batch.rows

    def _vectors(self, inputs: Sequence[Sequence[int]]) -> list[Embedding]:
        width = self.info.width
        if self.info.pooling != "none":
            pointers = [native.llama_get_embeddings_seq(self._handle, seq) for seq in range(len(inputs))]
            if not all(pointers):
                raise NativeFault("the library computed no embedding")
            return [np.ctypeslib.as_array(pointer, (1, width)).copy() for pointer in pointers]
        pointer = native.llama_get_embeddings(self._handle)
        if not pointer:
            raise NativeFault("the library computed no embeddings")
        rows = np.ctypeslib.as_array(pointer, (self._batch.rows, width)).copy()
        return np.split(rows, np.cumsum([len(tokens) for tokens in inputs])[:-1])

    def abort(self) -> None:
        """Makes the running decode and every later one raise Aborted."""
        self._stop.set()

    def resume(self) -> None:
        """Lets later decodes run after `abort`."""
        self._stop.clear()

    def release_context(self) -> None:
        """Frees the context, but neither the model nor the vocabulary."""
        native.llama_free(self._handle)

    def close(self) -> None:
        """Frees the context, and the model if it is owned."""
        self.release_context()
        if self._owned and self.vocab.close():
            native.llama_model_free(self._model)


def open_embedding(config: EngineConfig, target: Backend, keep_loading: Callable[[], bool]) -> LlamaEmbedding:
    """Opens a context for embeddings of `config.embedding.path`, or of `target` if there is no such file.

    Raises ModelError, with nothing left in memory, if the file is no model or the pooling does not fit the model.
    """
    assert isinstance(target, LlamaBackend)
    if not config.embedding.path:
        return _open_context(config, target.model, target.vocab, Path(target.info.path), owned=False)
    path = Path(config.embedding.path)
    exact.prepare(path, exact=False)
    load = LoadConfig(load_mode=config.load.mode, repack=config.load.repack)
    own = structs.replace(config, model=structs.replace(config.model, path=str(path)), load=load)
    model = load_model(own, lambda share: None, keep_loading)
    try:
        vocab = LlamaVocab(model)
        return _open_context(config, model, vocab, path, owned=True)
    except BaseException:
        native.llama_model_free(model)
        raise


def _open_context(config: EngineConfig, model: Any, vocab: LlamaVocab, path: Path, *, owned: bool) -> LlamaEmbedding:
    if native.llama_model_has_encoder(model) and native.llama_model_has_decoder(model):
        raise ModelError(f"{path} computes no embeddings: it has an encoder and a decoder")
    pooling = config.embedding.pooling_type
    if pooling == "rank" and not any(name.startswith("cls.") for name in tensor_types(path)):
        raise ModelError(f"{path} cannot rerank: it has no classification head; --reranking needs a reranker model")
    library.clear_errors()
    params = _params(config, model, _UNSPECIFIED if pooling is None else _POOLING_TYPES[pooling])
    try:
        opened = LlamaEmbedding(model, vocab, path, params, owned=owned)
        if pooling is None and opened.info.pooling == "none":
            opened.release_context()
            params.pooling_type = _POOLING_TYPES["mean"]
            opened = LlamaEmbedding(model, vocab, path, params, owned=owned)
    except NativeFault as fault:
        reason = library.first_error() or str(fault)
        raise ModelError(f"cannot open a context for embeddings of {path}: {reason}") from None
    return opened


def _params(config: EngineConfig, model: Any, pooling: int) -> Any:
    trained: int = native.llama_model_n_ctx_train(model)
    rows = min(config.embedding.rows or DEFAULT_LIMIT, trained or DEFAULT_LIMIT)
    # The library computes rows of a recurrent model in ubatches of equal lengths, which would divide the longer inputs.
    recurrent = native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model)
    threads, gpu = thread_count(config.cpu, config.model.threads), bool(serving_gpu(config.model))
    scores_bytes = 4 * native.llama_model_n_head(model) * rows * rows
    plain = structs.replace(config.model, cache_type_k="f16", cache_type_v="f16")
    flash = resolve_flash_attention(plain, 1, gpu, scores_bytes, unified=True).flash_attention
    params = native.llama_context_default_params()
    if not config.embedding.path:
        set_rope(config.rope, params)
    params.embeddings = True
    params.pooling_type = pooling
    params.n_ctx = -(-rows // PAD_CELLS) * PAD_CELLS
    params.n_batch = params.n_ubatch = rows
    params.n_seq_max = 1 if recurrent else min(MAX_INPUTS, rows)
    params.kv_unified = True
    params.n_threads = threads
    params.n_threads_batch = config.model.threads_batch if config.model.threads_batch > 0 else threads
    params.flash_attn_type = FLASH_ATTENTION[flash]
    params.no_perf = True
    return params


def _describe(model: Any, vocab: LlamaVocab, path: Path, pooling: str, params: Any) -> EmbeddingInfo:
    template: bytes | None = native.llama_model_chat_template(model, b"rerank")
    width = native.llama_model_n_cls_out(model) if pooling == "rank" else native.llama_model_n_embd_out(model)
    return EmbeddingInfo(
        name=path.stem,
        path=str(path),
        pooling=pooling,
        width=width,
        limit=params.n_ubatch,
        rerank_template=template.decode("utf-8", "replace") if template else "",
        marks=_marks(native.llama_model_get_vocab(model), vocab),
    )


def _marks(native_vocab: Any, vocab: LlamaVocab) -> RerankMarks:
    """Returns the tokens around a pair as llama-server adds them: BOS, query, EOS, SEP, document, EOS."""
    separator: int = native.llama_vocab_sep(native_vocab)
    eos: int = native.llama_vocab_eos(native_vocab)
    start = (vocab.added[0],) if vocab.added[0] >= 0 else ()
    end_token = eos if eos >= 0 else separator
    end = (end_token,) if native.llama_vocab_get_add_eos(native_vocab) and end_token >= 0 else ()
    between = (separator,) if native.llama_vocab_get_add_sep(native_vocab) and separator >= 0 else ()
    return RerankMarks(start, (*end, *between), end)
