"""Text to tokens and back. The library's vocabulary functions may be called from any thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import llama_cpp as native

from engine.contract import EngineFault


class LlamaVocab:
    """The vocabulary of an opened model; not to be used once that is closed."""

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
        # Rendered here and now: later a reader may ask for a piece when the model is already closed.
        self._pieces = [self._render(token) for token in range(self.size)]
        self.special = frozenset(filter(self._is_special, range(self.size)))
        self._names = {token: self._spell(token) for token in self.special}
        self._idle = threading.Condition()
        self._busy = 0  # threads that ask the library, side by side; closing waits for them
        self._closed = False

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`; with `special`, special tokens are recognised and a BOS added if the model wants it.

        A lone surrogate, which no UTF-8 can hold, becomes a question mark. Raises EngineFault once closed.
        """
        with self._reading():
            return self._tokenize(text, special)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The library may be asked for the length of the block. Raises EngineFault once closed."""
        with self._idle:
            if self._closed:
                raise EngineFault("The model is closed.")
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Waits for those who ask the library, and lets nobody do so any more."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._busy)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 2
        while True:
            tokens = (native.llama_token * room)()
            count = native.llama_tokenize(self._vocab, data, len(data), tokens, room, special, special)
            if count >= 0:
                return list(tokens[:count])
            room = -count

    def piece(self, token: int) -> bytes:
        """The token's bytes; empty for control tokens."""
        return self._pieces[token]

    def _render(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = native.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _is_special(self, token: int) -> bool:
        """As llguidance has it, and as chat templates use them."""
        piece = self._pieces[token]
        bracketed = piece.startswith(b"<") and piece.endswith(b">")
        if piece and not bracketed:  # most tokens: it need not be asked
            return False
        attributes: int = native.llama_vocab_get_attr(self._vocab, token)
        wanted: int = native.LLAMA_TOKEN_ATTR_CONTROL | (native.LLAMA_TOKEN_ATTR_USER_DEFINED if bracketed else 0)
        return bool(attributes & wanted)

    def text(self, token: int) -> str:
        """How the vocabulary spells a token, special or not; empty for -1, the token a model does not have.

        Raises EngineFault once closed, unless the token is special.
        """
        if token < 0:
            return ""
        if (name := self._names.get(token)) is not None:
            return name
        with self._reading():
            return self._spell(token)

    def _spell(self, token: int) -> str:
        spelled: bytes | None = native.llama_vocab_get_text(self._vocab, token)
        return spelled.decode("utf-8", "replace") if spelled else ""

    @property
    def bos(self) -> str:
        """The text of the token that begins a sequence, if the model has one."""
        return self.text(native.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The text of the token that ends one, if the model has one."""
        return self.text(native.llama_vocab_eos(self._vocab))
