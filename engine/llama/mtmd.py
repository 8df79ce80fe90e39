"""A projector of llama.cpp's mtmd library: reads images and sounds, and encodes them as embeddings for the model.

Only a build with `-DLLAVA_BUILD=ON` has the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import Backend, NativeFault
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import library
from engine.llama.context import LlamaContext
from engine.llama.gguf_check import check_file
from engine.llama.gguf_file import data_end, digest, read_text
from engine.llama.library import FLASH_ATTENTION
from engine.llama.model import LlamaBackend
from engine.llama.params import metadata, serving_gpu
from engine.llama.row_positions import Coordinates
from engine.llama.threads import thread_count
from engine.media import Embeddings, MediaChunk, MediaPiece, MediaRun, UnreadableMedia

# Values of `enum mtmd_input_chunk_type`; the other one is that of sounds.
_TEXT, _IMAGE = 0, 1
_MARKER = b"<__media__>"
# Types of projectors whose embeddings depend on the position in the prompt, which is no part of the prefix cache's key.
_POSITION_DEPENDENT_TYPES = ("deepseek4v", "hunyuanvl")
# Architectures for which the library ends the process at the first embedding, unless the model has M-RoPE.
_TEXT_ONLY = ("glm4", "glm4moe")
# A folder without ffmpeg, which the library would start for a file that it detects as a video.
_NO_FFMPEG = b"/nonexistent"
# Side of the image that is read at start to check the number of its embeddings.
_PROBE_SIDE_PIXELS = 64


def mtmd_library() -> Any:
    """Returns the binding of mtmd. Raises ModelError if llama-cpp-python was built without mtmd."""
    try:
        from llama_cpp import mtmd_cpp
    except (OSError, RuntimeError):
        raise ModelError(
            "--mmproj needs a llama-cpp-python that was built with -DLLAVA_BUILD=ON: run `make serve VISION=1` once, "
            "or leave --mmproj out"
        ) from None
    return mtmd_cpp


class NativeChunk:
    """A native chunk of an image or a sound, freed with this object."""

    def __init__(self, mtmd: Any, context: Any, handle: Any) -> None:
        """Takes the ownership of `handle`."""
        self.handle = handle
        self.length: int = mtmd.mtmd_input_chunk_get_n_tokens(handle)
        self.causal = not mtmd.mtmd_decode_use_non_causal(context, handle)
        self.has_grid: bool = mtmd.mtmd_decode_use_mrope(context) and mtmd.mtmd_input_chunk_get_type(handle) == _IMAGE
        """True for an image with M-RoPE, whose rows have `positions`. Those of all other chunks are consecutive."""
        self._mtmd = mtmd
        weakref.finalize(self, mtmd.mtmd_input_chunk_free, handle)

    def positions(self, first: int) -> Coordinates:
        """Returns the positions of the rows of an image that begins at the position `first`, [4 sections, rows]."""
        found = (self._mtmd.mtmd_decoder_pos * self.length)()
        tokens = self._mtmd.mtmd_input_chunk_get_tokens_image(self.handle)
        self._mtmd.mtmd_helper_image_get_decoder_pos(tokens, first, found)
        t, x, y, z = np.frombuffer(found, np.int32).reshape(self.length, 4).T
        return np.stack((t, y, x, z))

    def overlaps(self) -> bool:
        """Returns True if the text after the image would have a position of the image."""
        return self.has_grid and int(self.positions(0)[:3].max()) >= self._mtmd.mtmd_input_chunk_get_n_pos(self.handle)


class LlamaProjector:
    """Implements `engine.media.Projector`."""

    def __init__(self, config: EngineConfig, target: LlamaBackend, context: LlamaContext) -> None:
        """Raises ModelError, with nothing left in memory, if the projector does not fit the model."""
        self._mtmd = mtmd = mtmd_library()
        self._target = context
        path = Path(config.media.path)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = config.media.offload and bool(serving_gpu(config.model))
        params.print_timings = False
        params.n_threads = thread_count(config.cpu, config.model.threads)
        params.media_marker = _MARKER
        params.warmup = config.model.warmup
        params.flash_attn_type = FLASH_ATTENTION[config.model.flash_attention]
        params.image_min_tokens = config.media.image_min_tokens or -1
        params.image_max_tokens = config.media.image_max_tokens or -1
        mtmd.mtmd_helper_log_set(library.log_callback, ctypes.c_void_p(0))
        library.clear_errors()
        self._handle = mtmd.mtmd_init_from_file(str(path).encode(), target.model, params)
        if not self._handle:
            raise ModelError(
                f"cannot open the projector {path}: {library.first_error() or 'the library gives no reason'}"
            )
        try:
            self.vision: bool = mtmd.mtmd_support_vision(self._handle)
            self.audio: bool = mtmd.mtmd_support_audio(self._handle)
            self._width: int = native.llama_model_n_embd_inp(target.model)
            settings = f"{digest(path)} {config.media.image_min_tokens} {config.media.image_max_tokens}"
            self.identity = hashlib.blake2b(settings.encode(), digest_size=32).digest()
            self._check(path, metadata(target.model, "general.architecture"))
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path, architecture: str) -> None:
        """Raises ModelError if the engine cannot serve the projector with a model of `architecture`."""
        if architecture in _TEXT_ONLY and not self._mtmd.mtmd_decode_use_mrope(self._handle):
            raise ModelError(
                f"the projector {path} cannot be used: llama.cpp takes no images with models of the architecture "
                f"{architecture} that have no M-RoPE; leave --mmproj out, or give --no-mmproj"
            )
        if not self.vision:
            return
        pixels = (ctypes.c_ubyte * (3 * _PROBE_SIDE_PIXELS**2))()
        bitmap = self._mtmd.mtmd_bitmap_init(_PROBE_SIDE_PIXELS, _PROBE_SIDE_PIXELS, pixels)
        try:
            pieces = self._pieces(bitmap)
        except UnreadableMedia as error:
            raise ModelError(f"the projector {path} cannot be used with this model. {error}") from None
        for piece in pieces:
            if isinstance(piece, NativeChunk) and not piece.causal and piece.length > self._target.ubatch:
                raise ModelError(
                    f"the projector {path} makes {piece.length} embeddings of an image, which must be decoded "
                    f"together: set --ubatch-size and --batch-size to {piece.length} or more"
                )

    def read(self, data: bytes) -> Sequence[MediaPiece]:
        """Returns the pieces of an image or a sound. Raises UnreadableMedia."""
        options = self._mtmd.mtmd_helper_init_opt_default()
        options.video_params.ffmpeg_bin_dir = _NO_FFMPEG
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        loaded = self._mtmd.mtmd_helper_bitmap_init_from_buf_wrapper(self._handle, buffer, len(data), False, options)
        if loaded.video_ctx:
            self._mtmd.mtmd_bitmap_free(loaded.bitmap)
            self._mtmd.mtmd_helper_video_free(loaded.video_ctx)
        if not loaded.bitmap or loaded.video_ctx:
            raise UnreadableMedia("The image or sound is damaged: it cannot be decoded.")
        return self._pieces(loaded.bitmap)

    def _pieces(self, bitmap: Any) -> list[MediaPiece]:
        """Returns the pieces of a native bitmap, and frees the bitmap. Raises UnreadableMedia."""
        mtmd = self._mtmd
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            text = mtmd.mtmd_input_text(_MARKER, len(_MARKER), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            if mtmd.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), bitmaps, 1):
                raise UnreadableMedia("The projector cannot use this image or sound; send one of another size.")
            count = mtmd.mtmd_input_chunks_size(chunks)
            return [self._piece(mtmd.mtmd_input_chunks_get(chunks, index)) for index in range(count)]
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _piece(self, handle: Any) -> MediaPiece:
        mtmd = self._mtmd
        if mtmd.mtmd_input_chunk_get_type(handle) != _TEXT:
            chunk = NativeChunk(mtmd, self._handle, mtmd.mtmd_input_chunk_copy(handle))
            if chunk.overlaps():
                raise UnreadableMedia("The model lacks positions for a part of this image; send one of another size.")
            return chunk
        count = ctypes.c_size_t()
        tokens = mtmd.mtmd_input_chunk_get_tokens_text(handle, ctypes.byref(count))
        text = list(tokens[: count.value])
        if any(token < 0 for token in text):
            raise UnreadableMedia("The vocabulary of the model lacks the tokens around images and sounds.")
        return text

    def encode(self, chunk: MediaChunk) -> Embeddings:
        """Returns the embeddings of a chunk. Raises NativeFault."""
        assert isinstance(chunk, NativeChunk)
        if code := self._mtmd.mtmd_encode_chunk(self._handle, chunk.handle):
            raise NativeFault(f"mtmd_encode_chunk returned {code}")
        output = self._mtmd.mtmd_get_output_embd(self._handle)
        embeddings: Embeddings = np.ctypeslib.as_array(output, (chunk.length, self._width)).copy()
        if not np.isfinite(embeddings).all():
            raise NativeFault("the embeddings of an image or sound are not finite")
        return embeddings

    def decode(self, seq: int, start: int, embeddings: Embeddings, run: MediaRun) -> None:
        """Appends one cell for each of `embeddings` to a sequence. Raises NoFreeCells, Aborted or NativeFault."""
        chunk, first = run.chunk, start - run.start
        assert isinstance(chunk, NativeChunk)
        positions = None
        if chunk.has_grid:
            positions = chunk.positions(self._target.row_positions[seq].at(run.start))
            positions = positions[:, first : first + len(embeddings)]
        self._target.decode_embeddings(seq, start, embeddings, causal=chunk.causal, positions=positions)

    def close(self) -> None:
        """Frees the projector."""
        self._mtmd.mtmd_free(self._handle)


def open_projector(config: EngineConfig, target: Backend) -> LlamaProjector:
    """Opens the projector `config.media.path` for the model of `target`. Raises ModelError, with nothing left in
    memory."""
    if not isinstance(target, LlamaBackend) or not isinstance(target.context, LlamaContext):
        raise ModelError("--mmproj needs a GGUF model that generates text; leave --mmproj out")
    if config.model.deterministic:
        raise ModelError(
            "--mmproj cannot be served with --deterministic: a cached prefix that ends within an image changes the "
            "rounding of the rest of the image"
        )
    path = Path(config.media.path)
    check_file(path, "projector (--mmproj)")
    if (size := path.stat().st_size) < (needed := data_end(path)):  # the library would compute without the last weights
        raise ModelError(f"the projector {path} is incomplete: it has {size} of {needed} bytes; download it again")
    kind = read_text(path, "clip.projector_type") or read_text(path, "clip.vision.projector_type")
    if kind in _POSITION_DEPENDENT_TYPES:
        raise ModelError(
            f"the projector {path} cannot be used: embeddings of type {kind} depend on their position in the prompt, "
            "which the prefix cache does not distinguish; leave --mmproj out, or give --no-mmproj"
        )
    return LlamaProjector(config, target, target.context)
