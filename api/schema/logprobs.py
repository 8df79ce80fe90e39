"""Log probabilities in the shapes of chat completions and of text completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from api.schema.replies import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from engine import Logprob, Vocab

# JSON has no minus infinity; OpenAI's API uses this value instead.
MIN_LOGPROB = -9999.0


def chat_logprobs(vocab: Vocab, logprobs: Sequence[Logprob]) -> ChatLogprobs:
    """Returns the log probabilities of a chat choice or chunk, each token with its bytes."""
    return ChatLogprobs(
        [
            TokenLogprob(
                _text(vocab.piece(entry.token)),
                max(MIN_LOGPROB, entry.logprob),
                list(vocab.piece(entry.token)),
                [
                    TopLogprob(_text(vocab.piece(token)), max(MIN_LOGPROB, logprob), list(vocab.piece(token)))
                    for token, logprob in entry.top
                ],
            )
            for entry in logprobs
        ]
    )


class TextLogprobsBuilder:
    """Builds the log probabilities of one text choice, chunk by chunk, with character offsets in the choice's text."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def build(self, logprobs: Sequence[Logprob], top: int) -> TextLogprobs:
        """Returns the log probabilities of the next tokens; without `top_logprobs` if `top` is 0."""
        offsets = []
        for entry in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._vocab.piece(entry.token)))
        return TextLogprobs(
            [_text(self._vocab.piece(entry.token)) for entry in logprobs],
            [max(MIN_LOGPROB, entry.logprob) for entry in logprobs],
            [self._top_logprobs(entry) for entry in logprobs] if top else None,
            offsets,
        )

    def _top_logprobs(self, entry: Logprob) -> dict[str, float]:
        return {_text(self._vocab.piece(token)): max(MIN_LOGPROB, logprob) for token, logprob in entry.top}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
