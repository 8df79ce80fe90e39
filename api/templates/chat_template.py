"""Chat templates, run as Hugging Face's `apply_chat_template` runs them.

A template is a program of strangers: it runs sandboxed, and whatever it fails with is the request's failure. How long
it runs, and how much memory it takes, is bounded for single products and powers only, not for loops of loops, or for
texts that these make longer and longer. So only who is trusted may bring one (`--trust-request-chat-template`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct

from api.config.server import ChatConfig
from api.http.decode_errors import nearest
from api.templates.builtin import BUILTIN
from engine import RequestRefused

RENDERED = 2**24
"""Characters that a template may make of a conversation."""
BITS = 2**12
"""Of a number that a template may make."""
SAID = 500
"""Characters of its complaint that are told, which may be a whole conversation."""


class TemplateTrouble(Exception):
    """A template, or a setting about templates, cannot be used; the message is one line."""


class Capabilities(Struct, frozen=True, kw_only=True):
    """What a template makes use of, found out by trying, under llama-server's names."""

    supports_string_content: bool
    supports_typed_content: bool
    """Whether content may be a list of parts."""
    supports_system_role: bool
    supports_tools: bool
    supports_tool_calls: bool
    supports_parallel_tool_calls: bool
    supports_object_arguments: bool
    """Whether a call's arguments are shown as JSON if they come as an object."""
    supports_preserve_reasoning: bool
    """Whether reasoning of earlier turns can be kept."""
    supports_reasoning_effort: bool


Found = TypeVar("Found")


class found_once(Generic[Found]):
    """A property that is found when first asked for. In Python 3.11 `cached_property` has a lock, which all templates
    would share: one that takes for ever must not hold up the others."""

    def __init__(self, find: Callable[[Any], Found]) -> None:
        self.__doc__ = find.__doc__
        self._find = find

    def __get__(self, owner: Any, kind: type) -> Found:
        found = owner.__dict__[self._find.__name__] = self._find(owner)
        return found


class ChatTemplate:
    """A compiled template. Safe to use from any thread."""

    def __init__(self, source: str) -> None:
        """Raises TemplateTrouble if it is not Jinja."""
        self.source = source
        try:
            self._template: Template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateTrouble(f"{error.message} (line {error.lineno})") from None
        except Exception as error:
            raise TemplateTrouble(f"{type(error).__name__}: {error}") from None

    def render(self, names: Mapping[str, Any]) -> str:
        """What it makes of `names`. Raises RequestRefused with what it says."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                size += len(piece)
                if size > RENDERED:
                    raise TemplateError("it writes too much")
        except TemplateError as error:
            raise RequestRefused(
                f"The chat template refuses this conversation: {str(error)[:SAID]}", field="messages"
            ) from None
        except Exception as error:
            kind = type(error).__name__
            raise RequestRefused(
                f"The chat template fails on this conversation: {kind}: {str(error)[:SAID]}", field="messages"
            ) from None
        return "".join(pieces)

    def fitted(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with content in a form that the template reads, and in a role that it knows.

        A list of parts becomes one text, a part a line, unless the template goes through lists; a text becomes a list
        if it reads nothing else.
        """
        content = message["content"]
        if isinstance(content, list) and not self.reads_parts:
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and content and not self.reads_text and self.reads_parts:
            content = [{"type": "text", "text": content}]
        role = message["role"]
        if role == "developer" and "developer" not in self.source:
            role = "system"
        return {**message, "role": role, "content": content}

    @found_once
    def reads_text(self) -> bool:
        """Whether content may be a text."""
        return _NEEDLE in self._tried([_user(_NEEDLE)])

    @found_once
    def reads_parts(self) -> bool:
        """Whether content may be a list of parts."""
        shown = self._tried([_user([{"type": "text", "text": _NEEDLE}])])
        if self.reads_text:
            return shown == self._tried([_user(_NEEDLE)])
        return _NEEDLE in shown and "'text'" not in shown and '"text"' not in shown

    @found_once
    def capabilities(self) -> Capabilities:
        """What it makes use of."""
        called = self._tried([_user("x"), _calling({"place": _NEEDLE}), _user("y")])
        several = self._tried([_user("x"), _calling({}, {}), _user("y")])
        thought = [_user("x"), {"role": "assistant", "content": "x", "reasoning_content": _NEEDLE}, _user("y")]
        efforts = {self._tried([_user("x")], reasoning_effort=effort) for effort in ("low", "high")}
        return Capabilities(
            supports_string_content=self.reads_text,
            supports_typed_content=self.reads_parts,
            supports_system_role=_NEEDLE in self._tried([{"role": "system", "content": _NEEDLE}, _user("x")]),
            supports_tools=_NEEDLE in self._tried([_user("x")], tools=[_TOOL]),
            supports_tool_calls="call_0" in called or "call_0" in several,
            supports_parallel_tool_calls="call_0" in several and "call_1" in several,
            supports_object_arguments=_NEEDLE in called and "{'place'" not in called,
            supports_preserve_reasoning=_NEEDLE in self._tried(thought, **_KEEP_REASONING),
            supports_reasoning_effort=len(efforts) > 1,
        )

    def _tried(self, messages: Sequence[dict[str, Any]], **names: Any) -> str:
        """What it makes of `messages`; empty if it refuses them."""
        try:
            return self.render(
                {
                    "messages": messages,
                    "add_generation_prompt": True,
                    "bos_token": "",
                    "eos_token": "",
                    "tools": None,
                    "documents": None,
                    **names,
                }
            )
        except RequestRefused:
            return ""


_NEEDLE = "needle"
_TOOL = {"type": "function", "function": {"name": _NEEDLE, "description": "", "parameters": {"type": "object"}}}
# The names that families give to keeping the reasoning of earlier turns.
_KEEP_REASONING = {
    "preserve_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
    "drop_thinking": False,
}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _calling(*arguments: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message with calls of these arguments."""
    calls = [
        {"type": "function", "id": f"id{index:07}", "function": {"name": f"call_{index}", "arguments": each}}
        for index, each in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@lru_cache(maxsize=16)
def compiled(text: str) -> ChatTemplate:
    """The template that a request brings, as its name or as Jinja. Raises TemplateTrouble."""
    return ChatTemplate(named(text))


def named(text: str) -> str:
    """The built-in template of that name, or `text` itself if it is Jinja. Raises TemplateTrouble."""
    if text in BUILTIN:
        return BUILTIN[text]
    if "{" not in text:
        raise TemplateTrouble(f"there is no chat template named {text[:64]!r}{nearest(text, BUILTIN)}")
    return text


def wanted(chat: ChatConfig) -> str | None:
    """The template that the settings ask for; None if they leave it to the model. Raises TemplateTrouble."""
    if chat.template and chat.template_file:
        raise TemplateTrouble("--chat-template and --chat-template-file exclude each other")
    if chat.template_file:
        try:
            return Path(chat.template_file).read_text("utf-8")
        except OSError as error:
            raise TemplateTrouble(f"--chat-template-file: cannot read {chat.template_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TemplateTrouble(f"--chat-template-file: {chat.template_file} is not a text: {error}") from None
    try:
        return named(chat.template) if chat.template else None
    except TemplateTrouble as error:
        raise TemplateTrouble(f"--chat-template: {error}") from None


def names_of(chat: ChatConfig) -> dict[str, Any]:
    """The names that templates get besides those of a request. Raises TemplateTrouble."""
    try:
        return msgspec.json.decode(chat.template_kwargs or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise TemplateTrouble(f"--chat-template-kwargs: expected a JSON object: {error}") from None


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers, where it is a call block: what is set in it ends with it.
        return nodes.Scope(body, lineno=line)


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


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers that would make something of any size at once: nothing can interrupt one, and
    meanwhile no other thread gets its turn."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _too_much(operator, left, right):
            raise TemplateError(f"what {operator} makes is too large")
        return super().call_binop(context, operator, left, right)


def _too_much(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        many = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return many > BITS
    repeated, times = (left, right) if isinstance(right, int) else (right, left)
    return isinstance(times, int) and isinstance(repeated, Sized) and len(repeated) * times > RENDERED


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
