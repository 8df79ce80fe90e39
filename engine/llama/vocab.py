"""The vocabulary of a model. The library's vocabulary functions may be called from any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native

from engine.backend import FimTokens
from engine.contract import EngineFault, ModelError
from engine.llama import library
from engine.llama.gguf_check import check_file
from engine.llama.placement import parse_overrides
from engine.llama.special_tokens import PIECE_BYTES, SpecialToken, SpecialTokenSplitter
from engine.worker_pool import checkpoint

# Seconds for a running call of the library to end before the model is freed.
_CLOSE_SECONDS = 5.0

# `LLAMA_VOCAB_TYPE_SPM` and `LLAMA_VOCAB_TYPE_BPE`: tokenizers whose tokens together contain every byte of a text.
_COVERING_KINDS = (1, 2)


class LlamaVocab:
    """The vocabulary of an opened model. After `close`, methods that call the library raise EngineFault."""

    def __init__(self, model: Any) -> None:
        self._vocab = native.llama_model_get_vocab(model)
        self.size: int = native.llama_vocab_n_tokens(self._vocab)
        self.ends = frozenset(token for token in range(self.size) if native.llama_vocab_is_eog(self._vocab, token))
        self.adds_bos = bool(native.llama_vocab_get_add_bos(self._vocab))
        self.kind: int = native.llama_vocab_type(self._vocab)
        bos, eos = native.llama_vocab_bos(self._vocab), native.llama_vocab_eos(self._vocab)
        self.added: tuple[int, int] = (
            bos if self.adds_bos else -1,
            eos if native.llama_vocab_get_add_eos(self._vocab) else -1,
        )
        self.fim = FimTokens(
            native.llama_vocab_fim_pre(self._vocab),
            native.llama_vocab_fim_suf(self._vocab),
            native.llama_vocab_fim_mid(self._vocab),
            native.llama_vocab_fim_rep(self._vocab),
            native.llama_vocab_fim_sep(self._vocab),
        )
        # Computed here, as pieces and names are still used after the model is closed.
        self._pieces = [self._token_to_piece(token) for token in range(self.size)]
        self.special = frozenset(filter(self._is_special, range(self.size)))
        self._names = {token: self._token_text(token) for token in self.special}
        self._idle = threading.Condition()
        self._calls = 0  # number of calls of the library that run now
        self._closed = False

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Returns the token ids of `text`.

        With `special`, special tokens in the text are recognised and BOS is added if the model expects it. A lone
        surrogate, which UTF-8 cannot encode, becomes a question mark. Raises EngineFault after `close`.
        """
        data = text.encode("utf-8", "replace")
        if len(data) <= PIECE_BYTES:
            with self._library_call():
                return self._tokenize(data, add=special, parse=special)
        tokens: list[int] = []
        for piece in self._splitter(special=special).split(data):
            checkpoint()
            with self._library_call():
                tokens += self._tokenize(piece, add=False, parse=special)
        before, after = self._added_tokens if special else ([], [])
        return [*before, *tokens, *after]

    @property
    def longest_token(self) -> int:
        """Maximum bytes of text in one token; 0 if there is no maximum."""
        strips: int = native.LLAMA_TOKEN_ATTR_LSTRIP | native.LLAMA_TOKEN_ATTR_RSTRIP
        with self._library_call():
            unbounded = any(native.llama_vocab_get_attr(self._vocab, token) & strips for token in self.special)
        if unbounded or self.kind not in _COVERING_KINDS:
            return 0
        return max(*map(len, self._pieces), *(len(name.encode()) for name in self._names.values()), 1)

    def _splitter(self, *, special: bool) -> SpecialTokenSplitter:
        return self._special_splitter if special else self._user_defined_splitter

    @cached_property
    def _special_splitter(self) -> SpecialTokenSplitter:
        found: int = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN
        return SpecialTokenSplitter(self._tokens_with(found | native.LLAMA_TOKEN_ATTR_USER_DEFINED))

    @cached_property
    def _user_defined_splitter(self) -> SpecialTokenSplitter:
        return SpecialTokenSplitter(self._tokens_with(native.LLAMA_TOKEN_ATTR_USER_DEFINED))

    def _tokens_with(self, wanted: int) -> list[SpecialToken]:
        """Returns the tokens that have one of the attributes `wanted`."""
        with self._library_call():
            attributes = ((token, native.llama_vocab_get_attr(self._vocab, token)) for token in range(self.size))
            return [
                SpecialToken(
                    native.llama_vocab_get_text(self._vocab, token),
                    bool(each & native.LLAMA_TOKEN_ATTR_LSTRIP),
                    bool(each & native.LLAMA_TOKEN_ATTR_RSTRIP),
                )
                for token, each in attributes
                if each & wanted
            ]

    @cached_property
    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """The tokens that the library adds before and after a text."""
        with self._library_call():
            added = self._tokenize(b"", add=True, parse=False)
        first = len(added) > 1 or self.adds_bos
        return added[:first], added[first:]

    @contextmanager
    def _library_call(self) -> Iterator[None]:
        """Keeps the vocabulary open while the `with` block runs. Raises EngineFault after `close`."""
        with self._idle:
            if self._closed:
                raise EngineFault("The model is closed.")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def close(self) -> bool:
        """Refuses later calls of the library with EngineFault, and waits for the running ones. Returns False if one
        takes too long: the model must then not be freed."""
        with self._idle:
            self._closed = True
            return self._idle.wait_for(lambda: not self._calls, _CLOSE_SECONDS)

    def _tokenize(self, data: bytes, *, add: bool, parse: bool) -> list[int]:
        capacity = len(data) + 2
        while True:
            tokens = (native.llama_token * capacity)()
            count = native.llama_tokenize(self._vocab, data, len(data), tokens, capacity, add, parse)
            if count >= 0:
                return list(tokens[:count])
            capacity = -count

    def piece(self, token: int) -> bytes:
        """Returns the token's bytes; empty for control tokens."""
        return self._pieces[token]

    def _token_to_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = native.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _is_special(self, token: int) -> bool:
        """Returns True for control tokens, and for user-defined tokens in angle brackets, which chat templates use."""
        piece = self._pieces[token]
        bracketed = piece.startswith(b"<") and piece.endswith(b">")
        if piece and not bracketed:  # true of most tokens; saves the call of the library
            return False
        attributes: int = native.llama_vocab_get_attr(self._vocab, token)
        special: int = native.LLAMA_TOKEN_ATTR_CONTROL | (native.LLAMA_TOKEN_ATTR_USER_DEFINED if bracketed else 0)
        return bool(attributes & special)

    def text(self, token: int) -> str:
        """Returns the token's text in the vocabulary; empty for -1, which stands for a missing token.

        Raises EngineFault after `close`, except for special tokens.
        """
        if token < 0:
            return ""
        if (name := self._names.get(token)) is not None:
            return name
        with self._library_call():
            return self._token_text(token)

    def _token_text(self, token: int) -> str:
        text: bytes | None = native.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace") if text else ""

    @property
    def bos(self) -> str:
        """Text of the BOS token; empty if the model has none."""
        return self._special_text(native.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the EOS token; empty if the model has none."""
        return self._special_text(native.llama_vocab_eos(self._vocab))

    def _special_text(self, token: int) -> str:
        # For a file without the token's number the library returns a default, which may be a token of plain text.
        return self.text(token) if token in self.special else ""


@contextmanager
def open_vocabulary(path: Path, override_kv: Sequence[str] = ()) -> Iterator[LlamaVocab]:
    """Opens the vocabulary of a GGUF without loading weights. `override_kv` is that of `LoadConfig`, which can change
    the tokenizer. Raises ModelError."""
    check_file(path)
    library.initialize()
    params = native.llama_model_default_params()
    params.vocab_only = True
    no_devices = (ctypes.c_void_p * 1)()  # so that no context is created on a GPU
    params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    if (overrides := parse_overrides(override_kv)) is not None:
        params.kv_overrides = overrides
    model = native.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        reason = library.first_error() or "the library gave no reason"
        raise ModelError(f"cannot load the vocabulary of {path}: {reason}")
    vocab = LlamaVocab(model)
    try:
        yield vocab
    finally:
        if vocab.close():
            native.llama_model_free(model)
