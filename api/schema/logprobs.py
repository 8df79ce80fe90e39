"""Log probabilities as the two kinds of completions tell them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from api.schema.replies import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from engine import Logprob, Vocab

LEAST = -9999.0
"""What stands for minus infinity, which JSON cannot say."""


def chat_logprobs(vocab: Vocab, logprobs: Sequence[Logprob]) -> ChatLogprobs:
    """The tokens with their bytes."""
    return ChatLogprobs(
        [
            TokenLogprob(
                _text(vocab.piece(entry.token)),
                max(LEAST, entry.logprob),
                list(vocab.piece(entry.token)),
                [
                    TopLogprob(_text(vocab.piece(token)), max(LEAST, logprob), list(vocab.piece(token)))
                    for token, logprob in entry.top
                ],
            )
            for entry in logprobs
        ]
    )


class Offsets:
    """Writes the logprobs of one text as they come, and knows how far into the text they are."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def logprobs(self, logprobs: Sequence[Logprob], top: int) -> TextLogprobs:
        """The next tokens, with their `top` likeliest."""
        offsets = []
        for entry in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._vocab.piece(entry.token)))
        return TextLogprobs(
            [_text(self._vocab.piece(entry.token)) for entry in logprobs],
            [max(LEAST, entry.logprob) for entry in logprobs],
            [self._likeliest(entry) for entry in logprobs] if top else None,
            offsets,
        )

    def _likeliest(self, entry: Logprob) -> dict[str, float]:
        return {_text(self._vocab.piece(token)): max(LEAST, logprob) for token, logprob in entry.top}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
