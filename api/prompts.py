"""Conversations and texts to token ids.

The chat template comes with the model and is a program of strangers: it runs sandboxed, and whatever it fails with
is the request's failure. The names it may use are those that Hugging Face's `apply_chat_template` offers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import anyio.to_thread
import msgspec
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from api.schema import ChatRequest, Message, Part, Prediction
from engine import ModelInfo, RequestRefused, Vocab

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template for models that bring none."""

LONG = 20_000
"""Characters from which on a text is worth a worker thread: some 5 ms of tokenizing."""

RENDERED = 2**24
"""Characters that a template may make of a conversation."""

# The space tells whether the template strips the content, in which case the space is gone.
_CUT = "\ue000paceline cuts here\ue001 "


class Prompts:
    """The model's way to write prompts."""

    def __init__(self, info: ModelInfo, vocab: Vocab) -> None:
        self._info = info
        self._vocab = vocab
        self.trouble: str | None = None
        """What is wrong with the model's template, for people; None if nothing is."""
        self._template = self._compiled(info.chat_template)
        self._knows_developer = "developer" in (info.chat_template or "")

    async def of_chat(self, request: ChatRequest) -> tuple[int, ...]:
        """The tokens of a conversation, up to where the assistant goes on. Raises RequestRefused."""
        if sum(map(_size, request.messages)) < LONG:
            return await self.of_text(self.render(request))
        return await self.of_text(await anyio.to_thread.run_sync(self.render, request))

    async def of_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, special ones in it recognised. Raises RequestRefused if there are none."""
        if len(text) < LONG:
            return self.tokens(text)
        return await anyio.to_thread.run_sync(self.tokens, text)

    async def of_prediction(self, prediction: Prediction | None) -> tuple[int, ...]:
        """The tokens of what a client expects, none special; empty if nothing. Raises RequestRefused."""
        if prediction is None:
            return ()
        content = prediction.content
        text = content if isinstance(content, str) else _joined(content, "prediction.content")
        tokenize = partial(self._vocab.tokenize, text, special=False)
        return tuple(tokenize() if len(text) < LONG else await anyio.to_thread.run_sync(tokenize))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for."""
        return b"".join(map(self._vocab.piece, tokens)).decode("utf-8", "replace")

    def tokens(self, text: str) -> tuple[int, ...]:
        """What `of_text` returns, computed here and now."""
        info = self._info
        if info.bos_added and info.bos:
            text = text.removeprefix(info.bos)  # many templates write it; the tokenizer would add a second
        tokens = self._vocab.tokenize(text, special=True)
        if not tokens:
            raise RequestRefused("The prompt is empty.", field="prompt")
        return tuple(tokens)

    def render(self, request: ChatRequest) -> str:
        """The conversation as the model wants to read it. Raises RequestRefused with what the template says."""
        if self._template is None:
            raise RequestRefused(f"{self.trouble} Use /v1/completions.")
        extend = bool(request.continue_final_message)
        if extend and request.add_generation_prompt:
            raise RequestRefused(
                "add_generation_prompt and continue_final_message exclude each other.",
                field="continue_final_message",
            )
        messages = [self._message(index, message) for index, message in enumerate(request.messages)]
        if extend:
            messages[-1]["content"] += _CUT
        begin = not extend if request.add_generation_prompt is None else request.add_generation_prompt
        names = {
            **(request.chat_template_kwargs or {}),
            "messages": messages,
            "add_generation_prompt": begin,
            "bos_token": self._info.bos,
            "eos_token": self._info.eos,
            "tools": None,
        }
        text = _run(self._template, names)
        return _cut(text) if extend else text

    def _message(self, index: int, message: Message) -> dict[str, Any]:
        """The message as templates know it: content as one text, and nothing that the client left out."""
        if message.content is None and message.role != "assistant":
            raise RequestRefused(
                f"A message of role {message.role!r} needs content.", field=f"messages[{index}].content"
            )
        fields: dict[str, Any] = msgspec.to_builtins(message)
        if isinstance(message.content, list):
            fields["content"] = _joined(message.content, f"messages[{index}].content")
        else:
            fields["content"] = message.content or ""
        if message.role == "developer" and not self._knows_developer:
            fields["role"] = "system"
        return fields

    def _compiled(self, source: str | None) -> Template | None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        if source is None:
            self.trouble = "The model has no chat template; ChatML is used."
            source = CHATML
        try:
            return environment.from_string(source)
        except Exception as error:
            self.trouble = f"The model's chat template cannot be used: {error}."
            return None


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _run(template: Template, names: dict[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(names):
            pieces.append(piece)
            size += len(piece)
            if size > RENDERED:
                raise TemplateError("it writes too much")
    except TemplateError as error:
        raise RequestRefused(f"The chat template refuses this conversation: {error}", field="messages") from None
    except Exception as error:
        kind = type(error).__name__
        raise RequestRefused(
            f"The chat template fails on this conversation: {kind}: {error}", field="messages"
        ) from None
    return "".join(pieces)


def _cut(text: str) -> str:
    """`text` up to the mark, stripped as the template would have stripped what stands before it."""
    at = text.rfind(_CUT.rstrip())
    if at < 0:
        raise RequestRefused(
            "The chat template does not show the last message, so it cannot be continued.",
            field="continue_final_message",
        )
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def _size(message: Message) -> int:
    parts = message.content
    return sum(len(part.text or "") for part in parts) if isinstance(parts, list) else len(parts or "")


def _joined(parts: Sequence[Part], path: str) -> str:
    """The text of a message that came in parts, all of which must be text."""
    for index, part in enumerate(parts):
        if part.type != "text":
            raise RequestRefused(
                f"Content parts of type {part.type[:32]!r} are not supported, only 'text'.",
                field=f"{path}[{index}].type",
            )
        if part.text is None:
            raise RequestRefused("A content part of type 'text' needs text.", field=f"{path}[{index}].text")
    return "".join(part.text or "" for part in parts)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As in transformers: jinja2's own would escape HTML, and msgspec spaces JSON unlike what models were shown.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
