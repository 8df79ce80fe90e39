"""The vocabulary of a model. The library's vocabulary functions may be called from any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import llama_cpp as native

from engine.backend import FimTokens
from engine.contract import EngineFault


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
        with self._library_call():
            return self._tokenize(text, special)

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

    def close(self) -> None:
        """Waits for running calls of the library. Later calls raise EngineFault."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._calls)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        capacity = len(data) + 2
        while True:
            tokens = (native.llama_token * capacity)()
            count = native.llama_tokenize(self._vocab, data, len(data), tokens, capacity, special, special)
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
