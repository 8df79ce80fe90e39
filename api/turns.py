"""How the answer to a chat is read: in which format, with which calls, from which tokens on."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from api.formats import Calls, Format, Lark, Parser
from api.prompts import Prompts
from api.schema import ChatRequest
from api.tools import calls_of
from engine import ReasoningBudget

_TAIL = 32
"""Tokens at the end of a prompt that tell whether the model is to think first."""


class Turn(Struct, frozen=True):
    """The assistant's turn as it was asked for."""

    format: Format
    calls: Calls
    split: bool
    """Whether reasoning is told apart from the answer."""
    opened: bool
    """Whether the prompt has begun the reasoning."""
    plain: bool
    """Whether the text is the content, as it is."""
    control: dict[str, int]
    """The markers of the format that are control tokens here."""
    budget: ReasoningBudget | None

    @property
    def spelled(self) -> tuple[tuple[int, str], ...]:
        """The tokens that must be seen to be read."""
        return () if self.plain else tuple((token, text) for text, token in self.control.items())

    def parser(self) -> Parser | None:
        """A fresh reader of one choice; None if there is nothing to tell apart."""
        return None if self.plain else Parser(self.format, self.calls, opened=self.opened, split=self.split)

    def grammar(self) -> str | None:
        """What the text must look like for its calls to be valid, in llguidance's Lark; None if there are none."""
        if not self.calls.tools:
            return None
        lark = Lark(self.control)
        self.format.grammar(lark, self.calls, opened=self.opened)
        return str(lark)


def turn_of(request: ChatRequest, prompts: Prompts, prompt: Sequence[int]) -> Turn:
    """The turn after `prompt`. Raises RequestRefused."""
    calls = calls_of(request)
    template = prompts.template_for(request)
    format = prompts.format_for(request)
    split = (request.reasoning_format or prompts.chat.reasoning_format) != "none"
    opened = format.opened_by(prompts.text_with_names_of(prompt[-_TAIL:]))
    thinks = opened or format.thinks(template.source)
    control = {text: token for text in format.markers if (token := prompts.control_token(text)) is not None}
    limit = prompts.budget_of(request)
    budget = None
    if limit >= 0 and thinks and format.closes:
        opens = "" if opened else format.opens[0]
        budget = ReasoningBudget(limit, opens, format.closes, prompts.closing(format.closes))
    return Turn(format, calls, split, opened, not calls.tools and not (thinks and split), control, budget)
