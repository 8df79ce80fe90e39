"""Prompts: chat requests rendered by the chat template, and text converted to tokens and back.

Chat templates get the same variables as from Hugging Face's `apply_chat_template`, and those that llama-server adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from api.config.server import ChatConfig, ServerConfig
from api.schema.requests import ChatRequest
from api.schema.value_size import is_larger
from api.templates.builtin import CHATML
from api.templates.chat_messages import append_end_mark, cut_at_end_mark, join_parts, template_message
from api.templates.chat_template import (
    ChatTemplate,
    InvalidTemplate,
    TemplateMessage,
    compile_template,
    configured_kwargs,
    configured_template,
    default_variables,
    effort_variables,
    thinking_variables,
)
from api.templates.media_files import MediaFiles
from api.templates.text_tokens import LONG_TEXT_CHARS, TextTokenizer
from api.templates.tool_messages import calls_as_text, with_argument_objects, with_tool_instructions
from api.tools.formats import ChatFormat, Generic, format_of
from engine import WORKERS, ModelInfo, RequestRefused, Vocab


class PromptRenderer(TextTokenizer):
    """Renders chat requests and converts between text and tokens, for one model."""

    def __init__(
        self,
        info: ModelInfo,
        vocab: Vocab,
        chat: ChatConfig = ChatConfig(),  # noqa: B008 (frozen)
        check_prompt_length: Callable[[int], None] = lambda tokens: None,
        media: MediaFiles | None = None,
    ) -> None:
        """`check_prompt_length` raises ContextExceeded if no prompt of at least so many tokens can run. Raises
        InvalidTemplate for invalid settings."""
        super().__init__(info, vocab, check_prompt_length)
        self.chat = chat
        self.media = media or MediaFiles(None, ServerConfig())
        """Loads the images and sounds of messages."""
        self._configured_variables = configured_kwargs(chat)
        self.warning: str | None = None
        """A sentence about the defect of the server's template. None if the template has no defect."""
        self.template = self._server_template()
        """The server's template. None if it is not valid Jinja: chat requests then need `chat_template`."""

    # ── chat ──

    async def render_chat(self, request: ChatRequest) -> str:
        """Returns `render(request)`, computed on a worker thread if it may take long. Raises RequestRefused,
        ContextExceeded for more messages than tokens fit the context."""
        self._check_prompt_length(len(request.messages))
        if request.chat_template is None and not is_long_chat(request):
            return self.render(request)
        return await WORKERS.run(self.render, request)

    def render(self, request: ChatRequest) -> str:
        """Returns the prompt of a conversation, with special tokens by name. Raises RequestRefused with the
        template's error message."""
        template = self.template_for(request)
        # Templates get the tools even if `tool_choice` is "none", as in vLLM and llama-server: earlier messages may
        # contain calls, and the prompt keeps its prefix.
        tools = request.offered_tools or None
        continues = _continues_last_message(request, prefill=self.chat.prefill_assistant)
        messages = [template_message(index, each, template.source) for index, each in enumerate(request.messages)]
        if continues:
            messages[-1] = join_parts(messages[-1])
        if "tool_calls" not in template.source:
            messages = list(map(calls_as_text, messages))
        if tools and isinstance(self.format_for(request), Generic):
            has_system_role = template.capabilities.supports_system_role
            messages, tools = with_tool_instructions(messages, tools, has_system_role=has_system_role), None
        if any("tool_calls" in message for message in messages) and template.capabilities.supports_object_arguments:
            messages = list(map(with_argument_objects, messages))
        messages = list(map(template.adapted, messages))
        if continues:
            append_end_mark(messages[-1])
        variables = self._variables(request, messages, tools, continues=continues)
        text = template.render(variables)
        if continues:
            text = cut_at_end_mark(text)
        elif variables["enable_thinking"] is False:
            text = self._with_closed_reasoning(request, text)
        return self._without_added_text(text)

    def _variables(
        self,
        request: ChatRequest,
        messages: list[TemplateMessage],
        tools: list[dict[str, Any]] | None,
        *,
        continues: bool,
    ) -> dict[str, Any]:
        """Returns the variables of the template. Raises RequestRefused if `enable_thinking` is not a boolean."""
        variables = {
            **default_variables(),
            "documents": None,
            # Templates of Firefunction take the tools as a text.
            "functions": json.dumps(tools, ensure_ascii=False, indent=2) if tools else "",
            **self._configured_variables,
            **self._reasoning_variables(request),
            **(request.chat_template_kwargs or {}),
            "messages": messages,
            "add_generation_prompt": not continues and request.add_generation_prompt is not False,
            "bos_token": self._info.bos,
            "eos_token": self._info.eos,
            "tools": tools,
        }
        if request.documents is not None:
            variables["documents"] = request.documents
        thinking = variables["enable_thinking"]
        if thinking is not None and not isinstance(thinking, bool):  # templates would take the text "false" for true
            raise RequestRefused(
                f"enable_thinking: expected true or false, not {str(thinking)[:32]!r}.",
                field="chat_template_kwargs.enable_thinking",
            )
        return variables

    def _with_closed_reasoning(self, request: ChatRequest, text: str) -> str:
        """Returns `text`, with a closing tag if the template opens the reasoning although thinking is off."""
        format = self.format_for(request)
        return text + format.closes if format.closes and format.opens_reasoning(text) else text

    def _without_added_text(self, text: str) -> str:
        """Returns `text` without the names of BOS and EOS at its ends where the tokenizer adds these tokens."""
        before, after = self._vocab.added
        text = text.removeprefix(self._info.bos) if before >= 0 else text
        return text.removesuffix(self._info.eos) if after >= 0 else text

    def template_for(self, request: ChatRequest) -> ChatTemplate:
        """Returns the template of the request, or the server's. Raises RequestRefused if it cannot be used."""
        if request.chat_template is not None:
            return self._request_template(request.chat_template)
        if self.template is None:
            raise RequestRefused(f"{self.warning} Use /v1/completions.")
        return self.template

    def format_for(self, request: ChatRequest) -> ChatFormat:
        """Returns the format of reasoning and tool calls. Raises RequestRefused if the template cannot be used."""
        return format_of(self.template_for(request).source)

    def reasoning_budget(self, request: ChatRequest) -> int:
        """Returns the maximum number of reasoning tokens, -1 for unlimited."""
        budget = request.thinking_budget
        return self.chat.reasoning_budget if budget is None else budget

    def closing_tokens(self, request: ChatRequest, tag: str) -> tuple[int, ...]:
        """Returns the tokens at the end of a reasoning budget: the message, the closing tag `tag` and an empty line."""
        message = request.reasoning_budget_message
        text = self.chat.reasoning_budget_message if message is None else message
        return (
            *self._vocab.tokenize(text, special=False),
            *self._tokenize_bare(tag),
            *self._vocab.tokenize("\n\n", special=False),
        )

    def _server_template(self) -> ChatTemplate | None:
        source = configured_template(self.chat) or self._info.chat_template
        if source is None:
            self.warning = "The model has no chat template; ChatML is used."
            return ChatTemplate(CHATML)
        try:
            template = ChatTemplate(source)
        except InvalidTemplate as error:
            self.warning = f"The chat template cannot be used: {error}."
            return None
        if not (template.accepts_text or template.accepts_parts):
            self.warning = "The chat template fails on a plain user message or does not show its content."
        return template

    def _request_template(self, text: str) -> ChatTemplate:
        if not self.chat.trust_request_template:
            raise RequestRefused(
                "This server accepts no chat_template from requests: omit the field, or start the server with "
                "--trust-request-chat-template.",
                field="chat_template",
            )
        try:
            return compile_template(text)
        except InvalidTemplate as error:
            raise RequestRefused(f"chat_template cannot be used: {error}.", field="chat_template") from None

    def _reasoning_variables(self, request: ChatRequest) -> dict[str, Any]:
        """Returns the template variables that control reasoning, by the names of several model families."""
        variables: dict[str, Any] = {}
        if request.reasoning_effort is not None:
            variables |= effort_variables(request.reasoning_effort)
        enabled = request.enable_thinking
        if enabled is None and (request.reasoning_effort == "none" or self.reasoning_budget(request) == 0):
            enabled = False
        if enabled is not None:
            variables |= thinking_variables(enabled)
        return variables


def is_long_chat(request: ChatRequest) -> bool:
    """Returns True if work on the messages, tools and schemas of a request takes more than about a millisecond."""
    rendered = (request.messages, request.tools, request.documents, request.chat_template_kwargs)
    return is_larger(LONG_TEXT_CHARS, rendered, request.response_format, request.json_schema, request.guided_json)


def _continues_last_message(request: ChatRequest, *, prefill: bool) -> bool:
    """Returns True if the completion continues the last message instead of starting a new one; with `prefill`, also the
    assistant's last message by default. Raises RequestRefused."""
    last = request.messages[-1]
    if request.continue_final_message is None and request.add_generation_prompt is None:
        continues = prefill and last.role == "assistant" and not (last.tool_calls or last.function_call)
        if continues and [message.role for message in request.messages[-2:]] == ["assistant", "assistant"]:
            # The beginning is llama-server's message, as clients may match it.
            raise RequestRefused(
                "Cannot have 2 or more assistant messages at the end of the list. Join them, or set "
                "add_generation_prompt or continue_final_message.",
                field="messages",
            )
        return continues
    if not request.continue_final_message:
        return False
    if request.add_generation_prompt:
        raise RequestRefused(
            "add_generation_prompt and continue_final_message exclude each other: set only one of them.",
            field="continue_final_message",
        )
    if last.tool_calls or last.function_call:
        raise RequestRefused(
            "A message with tool calls cannot be continued: omit continue_final_message.",
            field="continue_final_message",
        )
    return True
