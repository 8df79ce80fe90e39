"""A chat request made ready: its prompt, how the answer is read, and what that must look like."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from api.generation.constraints import Constraint, constraint_of, grammar_of
from api.generation.loaded_model import Core
from api.schema.requests import ChatRequest
from api.templates.prompts import Prompts
from api.tools.formats import Calls, Format, Lark, Parser, Rules
from api.tools.requested import calls_of
from engine import Choice, CompiledTooSlowly, Form, Grammar, JsonObject, JsonSchema, ReasoningBudget, RequestRefused
from engine import Lark as LarkForm

_TAIL = 32
"""Tokens at the end of a prompt that tell whether the model is to think first."""


class Turn(Struct, frozen=True):
    """The assistant's turn as it was asked for."""

    text: str
    """The conversation as the model reads it, special tokens by their names."""
    prompt: tuple[int, ...]
    """The same as tokens."""
    format: Format
    calls: Calls
    constraint: Constraint | None
    """What an answer that is no call must look like."""
    split: bool
    """Whether reasoning is told apart from the answer."""
    opened: bool
    """Whether the prompt has begun the reasoning."""
    thinks: bool
    """Whether reasoning may come."""
    special: dict[str, int]
    """The markers of the format that are special tokens here."""
    budget: ReasoningBudget | None

    @property
    def plain(self) -> bool:
        """Whether the text is the content, as it is."""
        return not self.calls.tools and not (self.thinks and self.split)

    @property
    def spelled(self) -> tuple[tuple[int, str], ...]:
        """The tokens that must be seen to be read."""
        return () if self.plain else tuple((token, text) for text, token in self.special.items())

    def parser(self) -> Parser | None:
        """A fresh reader of one choice; None if there is nothing to tell apart."""
        return None if self.plain else Parser(self.format, self.calls, opened=self.opened, split=self.split)

    async def grammar(self, engine: Core) -> Grammar | None:
        """What the text must look like: calls of the tools, valid by their schemas, and an answer by the
        constraint; None if anything will do. Raises RequestRefused, which names the field."""
        constraint = self.constraint
        alone = await grammar_of(engine, constraint)  # what is wrong with it is said of it alone
        if not self.calls.tools and not (self.thinks if constraint else self.calls.withheld):
            return alone
        if constraint is not None and not isinstance(constraint.form, _EXPRESSIONS):
            if not self.calls.tools and not self.opened:
                return alone  # which leaves no place for reasoning
            with_what = "tools" if self.calls.tools else "a prompt that has begun the reasoning"
            raise RequestRefused(f"{constraint.path} cannot be combined with {with_what}.", field=constraint.path)
        try:
            return await engine.compile(LarkForm(self._lark(constraint)))
        except RequestRefused as error:
            if not isinstance(error, CompiledTooSlowly):
                await self._blame(engine)
            error.field = error.field or ("tools" if self.calls.tools or constraint is None else constraint.path)
            raise

    def _lark(self, constraint: Constraint | None) -> str:
        """The grammar of the message. Raises RequestRefused."""
        lark = Lark(self.special)
        answer = None if constraint is None else _expression(lark, constraint.form)
        self.format.grammar(lark, Rules(self.calls, self.thinks, self.opened, answer))
        return str(lark)

    async def _blame(self, engine: Core) -> None:
        """Raises RequestRefused with the keyword that is to blame, if one tool's schema by itself is."""
        for index, tool in enumerate(self.calls.tools):
            try:
                await engine.compile(JsonSchema(msgspec.json.encode(tool.parameters)))
            except RequestRefused as error:
                error.field = f"tools[{index}].function.parameters{error.field or ''}"
                raise


async def turn_of(asked: ChatRequest, prompts: Prompts) -> Turn:
    """The turn that a request asks for: all that is done before its answer is begun, whichever endpoint it is for.
    Raises RequestRefused, which names the field."""
    constraint, calls = constraint_of(asked), calls_of(asked)
    text = await prompts.text_of_chat(asked)
    prompt = await prompts.of_text(text)
    format, source = prompts.format_for(asked), prompts.template_for(asked).source
    split = (asked.reasoning_format or prompts.chat.reasoning_format) != "none"
    opened = format.opened_by(prompts.text_with_names_of(prompt[-_TAIL:]))
    thinks = opened or format.thinks(source)
    special = {name: token for name in format.markers if (token := prompts.special_token(name)) is not None}
    limit, budget = prompts.budget_of(asked), None
    if limit >= 0 and thinks and format.closes:
        opens = "" if opened else format.opens[0]
        budget = ReasoningBudget(limit, opens, format.closes, prompts.closing(format.closes))
    return Turn(text, prompt, format, calls, constraint, split, opened, thinks, special, budget)


_EXPRESSIONS = JsonSchema, JsonObject, Choice
"""Forms that can be a part of a grammar, others are grammars themselves."""


def _expression(lark: Lark, form: Form) -> str:
    """The form, one of these, as a part of a grammar."""
    match form:
        case JsonSchema():
            return lark.json(msgspec.json.decode(form.schema))
        case JsonObject():
            return lark.json({"type": "object"})
        case Choice():
            return lark.any_of([lark.text(text) for text in form.texts])
    raise AssertionError("other forms are no part of a grammar")
