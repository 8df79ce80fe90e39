"""Jinja chat templates, rendered as by Hugging Face's `apply_chat_template`.

A template is untrusted code: it runs in a sandbox, and an error fails only the request. The sandbox bounds time and
memory of a single product or power, but not of nested loops or of texts that grow in a loop. Templates in requests
therefore need `--trust-request-chat-template`.
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
from api.http.decode_errors import choices_hint
from api.templates.builtin import BUILTIN_TEMPLATES
from engine import RequestRefused, checkpoint

# Longest text that a template may render, or create by one repetition.
MAX_RENDERED_CHARS = 2**24
# Largest integer that a template may compute.
MAX_INTEGER_BITS = 2**12
# Error messages of templates are cut to this length, because they may contain the whole conversation.
_MAX_ERROR_CHARS = 500

# A message as templates render it.
TemplateMessage = dict[str, Any]


class InvalidTemplate(Exception):
    """A template or a template setting is invalid. The message is one line."""


class Capabilities(Struct, frozen=True, kw_only=True):
    """The features of a template by llama-server's names, detected by rendering test conversations."""

    supports_string_content: bool
    supports_typed_content: bool
    """True if content may be a list of parts."""
    supports_system_role: bool
    supports_tools: bool
    supports_tool_calls: bool
    supports_parallel_tool_calls: bool
    supports_object_arguments: bool
    """True if call arguments that are an object, not a string, are rendered as JSON."""
    supports_preserve_reasoning: bool
    """True if the reasoning of earlier turns can be rendered."""
    supports_reasoning_effort: bool


_Value = TypeVar("_Value")


class lazy_property(Generic[_Value]):
    """A property that is computed at the first access.

    `cached_property` of Python 3.11 has one lock for all instances, so an endless template would block all others.
    """

    def __init__(self, compute: Callable[[Any], _Value]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute

    def __get__(self, owner: Any, kind: type) -> _Value:
        value = owner.__dict__[self._compute.__name__] = self._compute(owner)
        return value


class ChatTemplate:
    """A compiled template. Thread-safe."""

    def __init__(self, source: str) -> None:
        """Raises InvalidTemplate if `source` is not valid Jinja."""
        self.source = source
        try:
            self._template: Template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            raise InvalidTemplate(f"{error.message} (line {error.lineno})") from None
        except Exception as error:
            raise InvalidTemplate(f"{type(error).__name__}: {error}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the rendered text. Raises RequestRefused with the template's error message."""
        chunks: list[str] = []
        size = 0
        try:
            for chunk in self._template.generate(variables):
                checkpoint()
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError(f"the text is longer than {MAX_RENDERED_CHARS} characters")
        except TemplateError as error:
            raise RequestRefused(
                f"The chat template refuses this conversation: {str(error)[:_MAX_ERROR_CHARS]}", field="messages"
            ) from None
        except Exception as error:
            kind = type(error).__name__
            raise RequestRefused(
                f"The chat template fails on this conversation: {kind}: {str(error)[:_MAX_ERROR_CHARS]}",
                field="messages",
            ) from None
        return "".join(chunks)

    def adapted(self, message: TemplateMessage) -> TemplateMessage:
        """Returns the message with its content and role converted to types that the template supports.

        A list of parts becomes a string with one line for each part, unless the template accepts lists. A string
        becomes a list if the template accepts only lists. The role `developer` becomes `system` unless the template
        contains the name `developer`.
        """
        content = message["content"]
        if isinstance(content, list) and not self.accepts_parts:
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and content and not self.accepts_text and self.accepts_parts:
            content = [{"type": "text", "text": content}]
        role = message["role"]
        if role == "developer" and "developer" not in self.source:
            role = "system"
        return {**message, "role": role, "content": content}

    @lazy_property
    def accepts_text(self) -> bool:
        """True if content may be a string."""
        return _NEEDLE in self._probe([_user(_NEEDLE)])

    @lazy_property
    def accepts_parts(self) -> bool:
        """True if content may be a list of parts."""
        rendered = self._probe([_user([{"type": "text", "text": _NEEDLE}])])
        if self.accepts_text:
            return rendered == self._probe([_user(_NEEDLE)])
        return _NEEDLE in rendered and "'text'" not in rendered and '"text"' not in rendered

    @lazy_property
    def capabilities(self) -> Capabilities:
        """The features of the template, detected at the first access."""
        one_call = self._probe([_user("x"), _assistant_calls({"place": _NEEDLE}), _user("y")])
        two_calls = self._probe([_user("x"), _assistant_calls({}, {}), _user("y")])
        reasoning = [_user("x"), {"role": "assistant", "content": "x", "reasoning_content": _NEEDLE}, _user("y")]
        efforts = {self._probe([_user("x")], reasoning_effort=effort) for effort in ("low", "high")}
        return Capabilities(
            supports_string_content=self.accepts_text,
            supports_typed_content=self.accepts_parts,
            supports_system_role=_NEEDLE in self._probe([{"role": "system", "content": _NEEDLE}, _user("x")]),
            supports_tools=_NEEDLE in self._probe([_user("x")], tools=[_TOOL]),
            supports_tool_calls="call_0" in one_call or "call_0" in two_calls,
            supports_parallel_tool_calls="call_0" in two_calls and "call_1" in two_calls,
            supports_object_arguments=_NEEDLE in one_call and "{'place'" not in one_call,
            supports_preserve_reasoning=_NEEDLE in self._probe(reasoning, **_KEEP_REASONING),
            supports_reasoning_effort=len(efforts) > 1,
        )

    def _probe(self, messages: Sequence[TemplateMessage], **variables: Any) -> str:
        """Returns the rendered test conversation. The text is empty if the template raises an error."""
        try:
            return self.render(
                {
                    **default_variables(),
                    "messages": messages,
                    "add_generation_prompt": True,
                    "bos_token": "",
                    "eos_token": "",
                    "tools": None,
                    "documents": None,
                    **variables,
                }
            )
        except RequestRefused:
            return ""


_NEEDLE = "needle"
_TOOL = {"type": "function", "function": {"name": _NEEDLE, "description": "", "parameters": {"type": "object"}}}
# Variables by which templates of several model families keep the reasoning of earlier turns.
_KEEP_REASONING = {
    "preserve_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
    "drop_thinking": False,
}


def _user(content: Any) -> TemplateMessage:
    return {"role": "user", "content": content}


def _assistant_calls(*arguments: dict[str, Any]) -> TemplateMessage:
    """Returns an assistant message with one call for each of `arguments`."""
    calls = [
        {"type": "function", "id": f"id{index:07}", "function": {"name": f"call_{index}", "arguments": each}}
        for index, each in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@lru_cache(maxsize=16)
def compile_template(text: str) -> ChatTemplate:
    """Returns the compiled template. `text` is the name of a built-in template or Jinja. Raises InvalidTemplate."""
    return ChatTemplate(resolve_template(text))


def resolve_template(text: str) -> str:
    """Returns the built-in template named `text`, or else `text`, which is Jinja or several words to render literally.

    Raises InvalidTemplate for a single word that is no name.
    """
    if text in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[text]
    if "{" not in text and len(text.split()) == 1:
        raise InvalidTemplate(f"there is no chat template named {text[:64]!r}{choices_hint(text, BUILTIN_TEMPLATES)}")
    return text


def configured_template(chat: ChatConfig) -> str | None:
    """Returns the configured template. None means the model's own template. Raises InvalidTemplate."""
    if chat.template and chat.template_file:
        raise InvalidTemplate("--chat-template and --chat-template-file exclude each other: give one of them")
    if chat.template_file:
        try:
            return Path(chat.template_file).read_text("utf-8-sig")
        except OSError as error:
            raise InvalidTemplate(f"--chat-template-file: cannot read {chat.template_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidTemplate(f"--chat-template-file: {chat.template_file} is not UTF-8 text: {error}") from None
    try:
        return resolve_template(chat.template) if chat.template else None
    except InvalidTemplate as error:
        raise InvalidTemplate(f"--chat-template: {error}") from None


def default_variables() -> dict[str, Any]:
    """Returns the variables that llama-server gives to every template: today's date in two forms, thinking on, and
    no functions."""
    today = datetime.now()
    return {
        "datetime": today.strftime("%b %d %Y"),
        "date_string": today.strftime("%d %b %Y"),
        "enable_thinking": True,
        "functions": "",
    }


def configured_kwargs(chat: ChatConfig) -> dict[str, Any]:
    """Returns the configured template variables. Raises InvalidTemplate."""
    try:
        variables = msgspec.json.decode(chat.template_kwargs or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidTemplate(f"--chat-template-kwargs: expected a JSON object: {error}") from None
    if chat.reasoning != "auto":
        variables |= thinking_variables(chat.reasoning == "on")
    if chat.reasoning_effort:
        variables |= effort_variables(chat.reasoning_effort)
    if chat.preserve_reasoning is not None:
        variables |= {name: kept == chat.preserve_reasoning for name, kept in _KEEP_REASONING.items()}
    return variables


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """Returns the template variables that turn thinking on or off, by the names of several model families."""
    return {"enable_thinking": enabled, "thinking": enabled}


def effort_variables(effort: str) -> dict[str, Any]:
    """Returns the template variables of the reasoning effort, by the names of several model families."""
    return {"reasoning_effort": effort, "reasoning_strength": effort}


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's text for training. Only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # The body has a scope of its own, as in transformers, which implements the tag as a call block.
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
    # json.dumps as in transformers: jinja2's filter escapes HTML, and msgspec omits spaces that models are trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers with a huge result: such an operation cannot be interrupted and holds the GIL."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _is_excessive(operator, left, right):
            raise TemplateError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_excessive(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return bits > MAX_INTEGER_BITS
    repeated, times = (left, right) if isinstance(right, int) else (right, left)
    return isinstance(times, int) and isinstance(repeated, Sized) and len(repeated) * times > MAX_RENDERED_CHARS


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
