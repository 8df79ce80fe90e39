"""Prepares a chat request for generation: the prompt, and the parser and the grammar of the output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct

from api.generation.constraints import Constraint, compile_constraint, enforced_spec, parse_constraint
from api.generation.enforced_calls import EnforcedCalls
from api.generation.schema_checks import CompiledConstraint
from api.schema.requests import ChatRequest
from api.templates.prompts import PromptRenderer, is_long_chat
from api.tools.formats import AllowedCalls, ChatFormat, LarkBuilder, MessageConstraints, MessageParser, StopRanges
from api.tools.tool_choice import allowed_calls
from engine import (
    WORKERS,
    Engine,
    Grammar,
    GrammarSpec,
    GrammarTimeout,
    JsonObject,
    JsonSchema,
    Lark,
    MediaRun,
    OneOfTexts,
    ReasoningBudget,
    RequestRefused,
    StopScope,
)

# Tokens at the end of a prompt that are searched for an open reasoning tag.
_PROMPT_TAIL_TOKENS = 32

# Constraints that the grammar of a message can embed as an expression. Regex, GBNF and Lark are whole grammars.
_EMBEDDABLE = JsonSchema, JsonObject, OneOfTexts


class PreparedChat(Struct, frozen=True):
    """A chat request, ready for generation."""

    prompt_text: str
    """The rendered conversation, with special tokens by name."""
    prompt: tuple[int, ...]
    """The token ids of `prompt_text`."""
    format: ChatFormat
    calls: AllowedCalls
    constraint: Constraint | None
    """The constraint on an answer without tool calls."""
    split_reasoning: bool
    """True if reasoning goes to `reasoning_content`, False if reasoning stays in the content."""
    in_reasoning: bool
    """True if the prompt ends inside of the reasoning."""
    may_reason: bool
    """True if the output may contain reasoning."""
    marker_tokens: dict[str, int]
    """The token ids of the format's markers that are special tokens of the model."""
    reasoning_budget: ReasoningBudget | None
    media: tuple[MediaRun, ...] = ()
    """The images and sounds in `prompt`."""

    @property
    def is_plain(self) -> bool:
        """True if the output is the content and no parser is needed."""
        return not self.calls.tools and not (self.may_reason and self.split_reasoning)

    @property
    def control_texts(self) -> tuple[tuple[int, str], ...]:
        """The special tokens whose names the output must contain for the parser, as pairs of id and name."""
        return () if self.is_plain else tuple((token, text) for text, token in self.marker_tokens.items())

    def parser(self) -> MessageParser | None:
        """Returns a new parser for one choice; None if the output is plain."""
        if self.is_plain:
            return None
        return MessageParser(
            self.format, self.calls, in_reasoning=self.in_reasoning, split_reasoning=self.split_reasoning
        )

    @property
    def stop_scope(self) -> Callable[[], StopScope] | None:
        """Returns new scopes of the stop strings, which exclude tool calls. None if the output has no calls."""
        return (
            partial(StopRanges, self.format, self.calls, in_reasoning=self.in_reasoning) if self.calls.tools else None
        )

    async def grammar(self, engine: Engine) -> CompiledConstraint | None:
        """Returns the grammar of the output: tool calls valid by their schemas, or an answer valid by the constraint.

        None permits any output. Raises RequestRefused, which names the field.
        """
        constraint = self.constraint
        # The constraint is compiled alone first, so that an error names the constraint's own keyword.
        answer_only = await compile_constraint(engine, constraint)
        if answer_only is not None:
            answer_only = msgspec.structs.replace(answer_only, new_parser=self.parser)
        if not self.calls.tools and not (self.may_reason if constraint else self.calls.withheld):
            return answer_only
        if constraint is not None and not isinstance(constraint.spec, _EMBEDDABLE):
            if not self.calls.tools and not self.in_reasoning:
                return answer_only  # the constraint covers the whole output, which then contains no reasoning
            conflict = "tools" if self.calls.tools else "a prompt that ends inside of the reasoning"
            raise RequestRefused(
                f"{constraint.path}: a regex or grammar cannot be combined with {conflict}; use a JSON schema.",
                field=constraint.path,
            )
        answer = enforced_spec(constraint, answer_only)
        try:
            grammar, calls = await self._compile_message(engine, answer)
        except RequestRefused as error:
            error.field = error.field or ("tools" if self.calls.tools or constraint is None else constraint.path)
            raise
        answer_checks = () if answer_only is None else answer_only.checks
        return CompiledConstraint(grammar, (*answer_checks, *calls.checks), self.parser)

    async def _compile_message(self, engine: Engine, answer: GrammarSpec | None) -> tuple[Grammar, EnforcedCalls]:
        """Returns the grammar of the message, and the calls with the part of their schemas that it enforces. Raises
        RequestRefused."""

        def lark(calls: AllowedCalls) -> str:
            return self._lark(calls, answer)

        # On a worker thread, as large schemas take tens of milliseconds.
        text, calls = await WORKERS.run(lambda: EnforcedCalls.of(self.calls).build(lark))
        try:
            return await engine.compile(Lark(text)), calls
        except GrammarTimeout:
            raise
        except RequestRefused:
            # Compiling each schema alone finds the keyword that fails, which tools without strict drop.
            fewer = await calls.compiled_alone(engine)
            if fewer == calls:
                raise
        text, calls = await WORKERS.run(fewer.build, lark)
        return await engine.compile(Lark(text)), calls

    def _lark(self, calls: AllowedCalls, answer: GrammarSpec | None) -> str:
        """Returns the Lark grammar of the message. Raises RequestRefused."""
        lark = LarkBuilder(self.marker_tokens)
        expression = None if answer is None else _expression(lark, answer)
        self.format.grammar(lark, MessageConstraints(calls, self.may_reason, self.in_reasoning, expression))
        return str(lark)


async def prepare_chat(request: ChatRequest, prompts: PromptRenderer) -> PreparedChat:
    """Renders and tokenizes the prompt, and determines the format, the constraint and the reasoning of the output.

    Raises RequestRefused, which names the field.
    """
    if is_long_chat(request):
        constraint, calls = await WORKERS.run(lambda: (parse_constraint(request), allowed_calls(request)))
    else:
        constraint, calls = parse_constraint(request), allowed_calls(request)
    messages, files = await prompts.media.load(request.messages)
    prompt_text = await prompts.render_chat(msgspec.structs.replace(request, messages=messages))
    read = await prompts.media.read(prompt_text, files) if files else None
    prompt = await prompts.tokenize_prompt(prompt_text) if read is None else read.tokens
    format, template = prompts.format_for(request), prompts.template_for(request).source
    split_reasoning = (request.reasoning_format or prompts.chat.reasoning_format) != "none"
    if prompts.chat.skip_parsing:
        calls, split_reasoning = AllowedCalls(), False
    in_reasoning = format.opens_reasoning(prompts.detokenize(prompt[-_PROMPT_TAIL_TOKENS:]))
    may_reason = in_reasoning or format.may_reason(template)
    marker_tokens = {name: token for name in format.markers if (token := prompts.special_token(name)) is not None}
    max_tokens, budget = prompts.reasoning_budget(request), None
    if max_tokens >= 0 and may_reason and format.closes:
        opens = "" if in_reasoning else format.opens[0]
        budget = ReasoningBudget(max_tokens, opens, format.closes, prompts.closing_tokens(request, format.closes))
    return PreparedChat(
        prompt_text,
        prompt,
        format,
        calls,
        constraint,
        split_reasoning,
        in_reasoning,
        may_reason,
        marker_tokens,
        budget,
        () if read is None else read.runs,
    )


def _expression(lark: LarkBuilder, spec: GrammarSpec) -> str:
    """Returns the Lark expression of an embeddable constraint."""
    match spec:
        case JsonSchema():
            return lark.json(msgspec.json.decode(spec.schema))
        case JsonObject():
            return lark.json({"type": "object"})
        case OneOfTexts():
            return lark.any_of([lark.text(text) for text in spec.texts])
    raise AssertionError("the constraint is a whole grammar")
