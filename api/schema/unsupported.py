"""Refuses fields of a request that have no effect at its endpoint, unless their value is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from api.schema.requests import ChatRequest, GenerationRequest, TextRequest
from engine import RequestRefused


def _is_empty(value: Any) -> bool:
    return not value


def _is_any(value: Any) -> bool:
    return True


def _is_automatic(value: Any) -> bool:
    return value in ("auto", "none")


# For each field: a test that is true for values that mean off, and the remedy in words.
_OffValues = Mapping[str, tuple[Callable[[Any], bool], str]]

_UNSUPPORTED: _OffValues = {
    "grammar_lazy": (_is_empty, "only false is supported: a grammar applies from the first token"),
    "n_indent": (_is_empty, "only 0 is supported: indentation ends no output"),
}

_FOR_CHATS = "only a chat completion has this field; use /v1/chat/completions"
_CHAT_ONLY: _OffValues = {
    "tools": (_is_empty, _FOR_CHATS),
    "functions": (_is_empty, _FOR_CHATS),
    "function_call": (_is_automatic, _FOR_CHATS),
    "tool_choice": (_is_automatic, _FOR_CHATS),
    "parallel_tool_calls": (_is_any, _FOR_CHATS),  # without tools the field has no effect in chats either
    "documents": (_is_empty, _FOR_CHATS),
    "top_logprobs": (_is_empty, "only a chat completion has this field; set logprobs to the number of tokens"),
    "reasoning_format": (_is_automatic, _FOR_CHATS),
    "reasoning_effort": (lambda value: value == "none", _FOR_CHATS),
    "enable_thinking": (_is_empty, _FOR_CHATS),
    "reasoning_budget": (lambda value: value == -1, _FOR_CHATS),
    "reasoning_budget_tokens": (lambda value: value == -1, _FOR_CHATS),
    "thinking_budget_tokens": (lambda value: value == -1, _FOR_CHATS),
    "reasoning_budget_message": (_is_empty, _FOR_CHATS),
    "add_generation_prompt": (_is_empty, _FOR_CHATS),
    "continue_final_message": (_is_empty, _FOR_CHATS),
    "chat_template": (_is_empty, _FOR_CHATS),
    "chat_template_kwargs": (_is_empty, _FOR_CHATS),
}

_FOR_TEXTS = "only a text completion has this field; use /v1/completions"
_TEXT_ONLY: _OffValues = {"echo": (_is_empty, _FOR_TEXTS), "suffix": (_is_empty, _FOR_TEXTS)}

_FOR_LLAMA_SERVER = "only llama-server's completion has this field; use /completion"
_LLAMA_SERVER_ONLY: _OffValues = {
    "return_tokens": (_is_empty, _FOR_LLAMA_SERVER),
    "response_fields": (_is_empty, _FOR_LLAMA_SERVER),
}


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises RequestRefused for a field that would have no effect although the client expects one."""
    _refuse(request, _UNSUPPORTED)
    if request.shape != "chat":
        _refuse(request, _CHAT_ONLY)
    if request.shape != "text":
        _refuse(request, _TEXT_ONLY)
    if request.shape != "llama-server":
        _refuse(request, _LLAMA_SERVER_ONLY)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestRefused(
            f"best_of: {request.best_of} is not supported; leave the field out or set it to n, {request.n or 1}.",
            field="best_of",
        )
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise RequestRefused("top_logprobs: logprobs is not set; set logprobs to true.", field="top_logprobs")
    if isinstance(request, TextRequest) and request.echo and request.num_logprobs is not None:
        raise RequestRefused("echo: logprobs of the prompt are not computed; leave out echo or logprobs.", field="echo")


def _refuse(request: GenerationRequest, off_values: _OffValues) -> None:
    for name, (is_off, remedy) in off_values.items():
        value = getattr(request, name)
        if value is not None and not is_off(value):
            raise RequestRefused(f"{name}: {remedy}.", field=name)
