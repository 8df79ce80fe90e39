"""Fill-in-the-middle prompts: the tokens around a gap, and those of other files, in the order that models are trained
with (Qwen2.5-Coder, arXiv 2409.12186)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from api.templates.prompts import PromptRenderer
from engine import FimTokens

# The names of the repository and of the current file in a prompt, as in llama-server.
_REPOSITORY_NAME, _FILE_NAME = "myproject\n", "filename\n"
# Precedes another file if the model has no token for that, as in llama-server.
_SNIPPET_MARK = "\n\n--- snippet ---\n\n"


class InfillText(NamedTuple):
    """The tokens around a gap."""

    prefix: Sequence[int]
    suffix: Sequence[int]
    beginning: Sequence[int] = ()
    """The tokens with which the text in the gap begins."""

    def cut(self, tokens: int) -> InfillText:
        """Returns the text nearest to the gap, at most `tokens` long: three quarters before the gap and one quarter for
        `beginning`, which is never cut, and the text after the gap. llama-server has the same parts."""
        before, after = 3 * (tokens // 4), max(0, tokens // 4 - 2 - len(self.beginning))
        return InfillText(self.prefix[max(0, len(self.prefix) - before) :], self.suffix[:after], self.beginning)


class InfillFile(NamedTuple):
    """Another file of the repository, as context."""

    name: str
    text: str


def missing_fim_tokens(fim: FimTokens) -> str:
    """Returns the names of the tokens without which no gap can be marked; empty if the model has all of them."""
    return ", ".join(name for name in ("prefix", "suffix", "middle") if getattr(fim, name) < 0)


def infill_prompt(
    fim: FimTokens, bos: int, text: InfillText, *, context: Sequence[int] = (), suffix_first: bool = False
) -> tuple[int, ...]:
    """Returns the prompt whose continuation fills the gap. `bos` is the BOS token, or -1 to add none."""
    before = [fim.prefix, *text.prefix, *text.beginning]
    after = [fim.suffix, *text.suffix]
    start = [bos] if bos >= 0 else []
    parts = [*after, *before] if suffix_first else [*before, *after]
    return (*start, *context, *parts, fim.middle)


async def infill_context(prompts: PromptRenderer, fim: FimTokens, files: Sequence[InfillFile]) -> list[int]:
    """Returns the tokens of other files, which precede the text around the gap."""

    async def tokens_of(text: str) -> list[int]:
        return await prompts.tokenize_text(text, add_special=False, parse_special=False)

    context: list[int] = []
    if fim.repository >= 0:
        context += [fim.repository, *await tokens_of(_REPOSITORY_NAME)]
    for file in files:
        if fim.file >= 0:
            context += [fim.file, *await tokens_of(f"{file.name}\n")]
        else:
            context += await tokens_of(_SNIPPET_MARK)
        context += await tokens_of(file.text)
    if fim.file >= 0:
        context += [fim.file, *await tokens_of(_FILE_NAME)]
    return context
