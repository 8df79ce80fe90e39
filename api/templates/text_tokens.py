"""Text to tokens and back, for one model. Long texts are converted on a worker thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import TypeVar

from api.schema.request_values import PredictedOutput
from api.templates.chat_messages import part_texts
from engine import WORKERS, ModelInfo, RequestRefused, Vocab, checkpoint

_Argument = TypeVar("_Argument", bound=Sized)
_Result = TypeVar("_Result")

# Texts of this many characters, and lists of this many tokens, are processed on a worker thread: tokenizing 20,000
# characters takes about 5 ms.
LONG_TEXT_CHARS = 20_000


class TextTokenizer:
    """Converts between text and tokens, for one model."""

    def __init__(
        self, info: ModelInfo, vocab: Vocab, check_prompt_length: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """`check_prompt_length` raises ContextExceeded if no prompt of at least so many tokens can run."""
        self._info = info
        self._vocab = vocab
        self._check_prompt_length = check_prompt_length
        self._special_tokens: dict[str, int | None] = {}

    # ── text to tokens ──

    async def tokenize_prompt(self, text: str) -> tuple[int, ...]:
        """Returns `tokenize(text)`, computed on a worker thread if the text is long. Raises RequestRefused, and
        ContextExceeded for a text that is too long for the context with any tokens."""
        self._check_prompt_length(self._min_tokens(text))
        return await run_long_in_thread(self.tokenize, text)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Returns the tokens of a prompt. Names of special tokens are parsed, and BOS and EOS are added if the model
        expects them. Raises RequestRefused for an empty prompt."""
        info = self._info
        if info.bos_added and info.bos:
            text = text.removeprefix(info.bos)  # many templates render BOS, which the tokenizer adds too
        tokens = self._vocab.tokenize(text, special=True)
        if not tokens:
            raise RequestRefused("The prompt is empty.", field="prompt")
        return tuple(tokens)

    async def tokenize_prediction(self, prediction: PredictedOutput | None) -> tuple[int, ...]:
        """Returns the tokens of a predicted output, in which names of special tokens are plain text. Empty without a
        prediction. Raises RequestRefused."""
        if prediction is None:
            return ()
        content = prediction.content
        text = content if isinstance(content, str) else "".join(part_texts(content, "prediction.content"))
        return tuple(await run_long_in_thread(partial(self._vocab.tokenize, special=False), text))

    async def tokenize_text(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Returns the tokens of a text, which may be empty. `add_special` adds BOS and EOS if the model expects them,
        `parse_special` parses the names of special tokens."""
        self._check_total_length([text])
        return await run_long_in_thread(
            partial(self._tokenize_text, add_special=add_special, parse_special=parse_special), text
        )

    async def tokenize_parts(self, parts: Sequence[str | int], *, add_special: bool, parse_special: bool) -> list[int]:
        """Returns the tokens of a mixed list of texts and tokens. BOS and EOS are added around the first part only, and
        only if that part is a text."""
        return await WORKERS.run(
            partial(self._tokenize_parts, parts, add_special=add_special, parse_special=parse_special)
        )

    def _min_tokens(self, text: str) -> int:
        """Returns the minimum number of tokens of a text of this length."""
        return -(-len(text) // self._info.longest_token) if self._info.longest_token else 0

    def _check_total_length(self, parts: Sequence[str | int]) -> None:
        """Raises RequestRefused for texts that with any tokens are longer than the context and the training context."""
        longest, context = self._info.longest_token, max(self._info.context, self._info.trained_context)
        chars = sum(len(part) for part in parts if isinstance(part, str))
        if longest and chars > longest * context:
            raise RequestRefused(
                f"The text has {chars} characters; at most {longest * context} are tokenized, as a longer text never "
                f"fits a context of {context} tokens."
            )

    def _tokenize_text(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = self._vocab.tokenize(text, special=parse_special)
        if add_special and not parse_special:
            before, after = ([token] if token >= 0 else [] for token in self._vocab.added)
            return [*before, *tokens, *after]
        return tokens if add_special or not parse_special else without_added(self._vocab, tokens)

    def _tokenize_parts(self, parts: Sequence[str | int], *, add_special: bool, parse_special: bool) -> list[int]:
        self._check_total_length(parts)
        tokens: list[int] = []
        for index, part in enumerate(parts):
            checkpoint()
            if isinstance(part, int):
                tokens.append(part)
            else:
                tokens += self._tokenize_text(part, add_special=add_special and index == 0, parse_special=parse_special)
        return tokens

    def special_token(self, text: str) -> int | None:
        """Returns the id of the special token named `text`. None if there is no such token. `text` must not come from a
        client, as each result is kept."""
        if text not in self._special_tokens:
            tokens = self._tokenize_bare(text)
            is_special = len(tokens) == 1 and tokens[0] in self._vocab.special
            self._special_tokens[text] = tokens[0] if is_special else None
        return self._special_tokens[text]

    def _tokenize_bare(self, text: str) -> list[int]:
        return without_added(self._vocab, self._vocab.tokenize(text, special=True))

    # ── tokens to text ──

    def plain_text(self, tokens: Sequence[int]) -> str:
        """Returns the text of `tokens`, in which special tokens are omitted."""
        return b"".join(map(self._vocab.piece, tokens)).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Returns the text of `tokens`, with special tokens by name, and without the negative ids of images."""
        texts = map_distinct([token for token in tokens if token >= 0], self.token_bytes)
        return b"".join(texts).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Returns the token's bytes; for a special token, the name's bytes."""
        return self._vocab.piece(token) or self._vocab.text(token).encode()


def without_added(vocab: Vocab, tokens: list[int]) -> list[int]:
    """Returns `tokens` without the BOS and EOS that the tokenizer added."""
    before, after = vocab.added
    start = int(bool(tokens) and tokens[0] == before)
    return tokens[start : len(tokens) - int(len(tokens) > start and tokens[-1] == after)]


def map_distinct(tokens: Sequence[int], function: Callable[[int], _Result]) -> list[_Result]:
    """Returns `function` of each token. `function` is called once for each distinct token."""
    results = {token: function(token) for token in set(tokens)}
    return [results[token] for token in tokens]


async def run_long_in_thread(function: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
    """Returns `function(argument)`, computed on a worker thread if the argument is long."""
    if len(argument) < LONG_TEXT_CHARS:
        return function(argument)
    return await WORKERS.run(function, argument)
