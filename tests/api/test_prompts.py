"""Prompts: template variables, continued messages, template errors, and tokenization."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from api.config.server import ChatConfig
from api.schema.request_values import PredictedOutput
from api.schema.requests import ChatRequest, TextRequest
from api.templates.prompts import PromptRenderer
from api.templates.text_tokens import LONG_TEXT_CHARS
from engine import RequestRefused
from engine.worker_pool import WorkerPool
from tests.api.fake import BOS, INFO, START, ByteVocab

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
HI = {"role": "user", "content": "hi"}


def prompts_of(own: str | None, *, bos_added: bool = False, **config: Any) -> PromptRenderer:
    info = msgspec.structs.replace(INFO, chat_template=own, bos_added=bos_added)
    return PromptRenderer(info, ByteVocab(bos_added=bos_added), ChatConfig(**config))


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return msgspec.convert({"messages": messages or [HI], **fields}, ChatRequest)


def render(template: str | None, *messages: dict[str, Any], **fields: Any) -> str:
    return prompts_of(template).render(chat(*messages, **fields))


def test_the_template_of_smollm() -> None:
    assert render(SMOL) == (
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_without_a_template() -> None:
    renderer = prompts_of(None)
    assert renderer.render(chat()) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.warning == "The model has no chat template; ChatML is used."
    assert prompts_of(SMOL).warning is None


def test_without_generation_prompt() -> None:
    assert render(None, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("template", [None, SMOL])
@pytest.mark.parametrize("text", ["The answer is", "The answer is ", ""])
def test_continuing_the_last_message(template: str | None, text: str) -> None:
    shown = render(template, HI, {"role": "assistant", "content": text}, continue_final_message=True)
    assert shown.endswith(f"<|im_start|>assistant\n{text}")


def test_continuing_the_last_message_of_a_stripping_template() -> None:
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    message = {"role": "assistant", "content": "so far "}
    assert render(template, HI, message, continue_final_message=True) == "[hi][so far"


def test_a_last_message_that_is_not_rendered_cannot_be_continued() -> None:
    with pytest.raises(RequestRefused, match="does not show the last message"):
        render("{{ messages[0].content }}", HI, {"role": "assistant", "content": "x"}, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ {'a': 'é<\"', 'b': [1, none, true]} | tojson }}", '{"a": "é<\\"", "b": [1, null, true]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ messages[0].name }}|{{ messages[0].tool_calls is defined }}", "|False"),
        ("{% if tools %}tools{% endif %}{{ enable_thinking }}", "False"),
        ("{{ messages[0].content.split('i')[0] }}{{ messages | length }}", "h1"),
        ("{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ 1.5 * 2 }}", "1024abab3.0"),
        ("{{ tools is none }}{{ documents is none }}{{ unknown is defined }}", "TrueTrueFalse"),
    ],
)
def test_template_features(template: str, text: str) -> None:
    assert render(template, chat_template_kwargs={"enable_thinking": False}) == text


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
        ("{{ 10 ** (10 ** 8) }}", "too large"),
        ("{% set n = namespace(n=3) %}{% for i in range(64) %}{% set n.n = n.n * n.n %}{% endfor %}", "too large"),
        ("{{ ('x' * 10 ** 12) | length }}", "too large"),
        ("{{ (10 ** 12 * [messages]) | length }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_template_errors_fail_the_request(template: str, message: str) -> None:
    with pytest.raises(RequestRefused, match=message):
        render(template)


def test_invalid_jinja() -> None:
    renderer = prompts_of("{% if %}")
    assert renderer.warning is not None
    assert renderer.template is None
    assert renderer.tokenize("x") == (ord("x"),)
    with pytest.raises(RequestRefused, match="cannot be used"):
        renderer.render(chat())


def test_reserved_variables_override_kwargs() -> None:
    kwargs = {"messages": [], "bos_token": "evil", "self": 1, "add_generation_prompt": False}
    assert render("{{ bos_token }}{{ messages | length }}", chat_template_kwargs=kwargs) == "<s>1"


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts}
    assert render("{{ messages[0].content }}", message) == "a\nb"
    assert render(IN_PARTS, message) == "user:ab"
    assert render(IN_PARTS, HI) == "user:hi"


@pytest.mark.parametrize("text", ["so far", "so far ", ""])
def test_continuing_a_last_message_of_parts(text: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": text}]
    message = {"role": "assistant", "content": parts}
    assert render(IN_PARTS, HI, message, continue_final_message=True) == f"user:hiassistant:a\n\n{text}"
    parts.insert(0, {"type": "text", "text": ""})
    assert render(None, HI, message).endswith(f"assistant\na\n\n{text}"), "joined as by llama-server"


ANSWER = {"role": "assistant", "content": "so far"}
CALLED = {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
NEW = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "fields", "prefill", "end"),
    [
        (ANSWER, {}, True, "assistant\nso far"),
        (ANSWER, {}, False, NEW),
        (ANSWER, {"add_generation_prompt": True}, True, NEW),
        (ANSWER, {"add_generation_prompt": False}, True, "so far<|im_end|>\n"),
        (ANSWER, {"continue_final_message": False}, True, NEW),
        (ANSWER, {"continue_final_message": True}, False, "assistant\nso far"),
        (CALLED, {}, True, NEW),
        (HI, {}, True, NEW),
        (HI, {"continue_final_message": True}, True, "user\nhi"),
    ],
)
def test_continue_or_new_message(message: dict[str, Any], fields: dict[str, Any], prefill: bool, end: str) -> None:
    renderer = prompts_of(None, prefill_assistant=prefill)
    assert renderer.render(chat(HI, message, **fields)).endswith(end)


def test_two_assistant_messages_at_the_end() -> None:
    messages = (HI, ANSWER, ANSWER)
    with pytest.raises(RequestRefused, match="Cannot have 2 or more assistant messages at the end") as caught:
        render(None, *messages)
    assert caught.value.field == "messages"
    assert render(None, *messages, continue_final_message=True).endswith("assistant\nso far")
    assert render(None, *messages, add_generation_prompt=True).endswith(NEW)
    assert prompts_of(None, prefill_assistant=False).render(chat(*messages)).endswith(NEW)


@pytest.mark.parametrize("role", ["User", "human", "bot", "x" * 64])
def test_unknown_roles(role: str) -> None:
    with pytest.raises(RequestRefused, match="roles are system, developer, user, assistant, tool") as caught:
        render(None, HI, {"role": role, "content": "x"})
    assert caught.value.field == "messages[1].role"


def test_a_role_that_only_the_template_names() -> None:
    assert render("{% if messages[0].role == 'human' %}h{% endif %}", {"role": "human", "content": "x"}) == "h"


def test_legacy_function_messages() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}{% for c in m.tool_calls or [] %} {{ c.function.name }}"
        "{{ c.function.arguments }}{% endfor %} {{ m.content }}{{ m.function_call }}]{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "4"}
    assert render(template, HI, call, result) == "[user hi][assistant f{} ][tool 4]"


def test_a_call_cannot_be_continued() -> None:
    with pytest.raises(RequestRefused, match="tool calls cannot be continued"):
        render(None, HI, CALLED, continue_final_message=True)


def test_documents() -> None:
    template = "{% for d in documents or [] %}{{ d.title }}{% endfor %}"
    assert render(template, documents=[{"title": "a"}, {"title": "b"}]) == "ab"
    assert render(template, chat_template_kwargs={"documents": [{"title": "c"}]}) == "c"
    assert render(template) == ""


def test_template_and_kwargs_of_the_server() -> None:
    renderer = prompts_of(SMOL, template="{{ a }}{{ b }}{{ messages[0].content }}", template_kwargs='{"a": 1, "b": 2}')
    assert renderer.render(chat(chat_template_kwargs={"b": 3})) == "13hi"
    assert renderer.warning is None
    assert prompts_of(None, template="chatml").warning is None


def test_request_templates() -> None:
    own = "{{ messages[0].content }}!"
    with pytest.raises(RequestRefused, match="--trust-request-chat-template") as caught:
        render(SMOL, chat_template=own)
    assert caught.value.field == "chat_template"
    renderer = prompts_of("{% if %}", trust_request_template=True)
    assert renderer.render(chat(chat_template=own)) == "hi!"
    assert renderer.render(chat(chat_template="gemma")).endswith("<start_of_turn>model\n")
    for broken in ("{% if %}", "lama3"):
        with pytest.raises(RequestRefused, match="chat_template cannot be used") as caught:
            renderer.render(chat(chat_template=broken))
        assert caught.value.field == "chat_template"


def test_warning_for_a_template_that_always_fails() -> None:
    renderer = prompts_of("{{ raise_exception('never') }}")
    assert renderer.warning == "The chat template fails on a plain user message or does not show its content."
    with pytest.raises(RequestRefused, match="never"):
        renderer.render(chat())


def test_an_assistant_without_content() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    template = "{{ messages[1].content }}|{{ messages[1].tool_calls[0].function.name }}|{{ messages[2].tool_call_id }}"
    assert render(template, HI, message, {"role": "tool", "content": "r", "tool_call_id": "1"}) == "|f|1"


def test_an_empty_list_of_calls_is_dropped() -> None:
    assert render("{{ 'tool_calls' in messages[0] }}", {"role": "user", "content": "x", "tool_calls": []}) == "False"


def test_long_template_errors_are_cut() -> None:
    for template in ("{{ raise_exception('x' * 100000) }}", "{{ {}['x' * 100000] + 1 }}"):
        with pytest.raises(RequestRefused) as caught:
            render(template)
        assert len(str(caught.value)) < 700


def test_the_developer_role() -> None:
    message = {"role": "developer", "content": "x"}
    assert render("{{ messages[0].role }}", message) == "system"
    assert render("{% if messages[0].role == 'developer' %}d{% endif %}", message) == "d"


THINKING = "{% if enable_thinking %}on{% else %}off{% endif %}"


@pytest.mark.parametrize(
    ("config", "fields", "text"),
    [
        ({}, {}, "on"),
        ({"reasoning_budget": 0}, {}, "off"),
        ({"template_kwargs": '{"enable_thinking": false}'}, {}, "off"),
        ({}, {"reasoning_effort": "none"}, "off"),
        ({}, {"enable_thinking": False}, "off"),
        ({"reasoning_budget": 0}, {"chat_template_kwargs": {"enable_thinking": True}}, "on"),
    ],
)
def test_thinking_is_on_unless_reasoning_is_off(config: dict[str, Any], fields: dict[str, Any], text: str) -> None:
    assert prompts_of(THINKING, **config).render(chat(**fields)) == text


def test_enable_thinking_is_a_boolean() -> None:
    with pytest.raises(RequestRefused, match="expected true or false, not 'false'") as caught:
        render(THINKING, chat_template_kwargs={"enable_thinking": "false"})
    assert caught.value.field == "chat_template_kwargs.enable_thinking"


def test_reasoning_that_the_template_opens_is_closed_when_thinking_is_off() -> None:
    template = "{{ messages[0].content + '<think>\n' }}"
    assert render(template) == "hi<think>\n"
    assert render(template, enable_thinking=False) == "hi<think>\n</think>"


def test_dates_and_functions() -> None:
    form = "{{ datetime == strftime_now('%b %d %Y') }}{{ date_string == strftime_now('%d %b %Y') }}[{{ functions }}]"
    tools = [{"type": "function", "function": {"name": "é"}}]
    assert render(form) == "TrueTrue[]"
    text = json.dumps(tools, ensure_ascii=False, indent=2)
    assert render("<tool_call>{{ functions }}", tools=tools) == f"<tool_call>{text}"
    assert render("{{ date_string }}", chat_template_kwargs={"date_string": "1 May 2026"}) == "1 May 2026"


def test_a_literal_text_as_template() -> None:
    renderer = prompts_of(None, template="This is not a chat template, it is")
    assert renderer.render(chat()) == "This is not a chat template, it is"


@pytest.mark.parametrize(("bos_added", "text"), [(True, "hi"), (False, "<s>hi")])
def test_the_prompt_of_a_chat_has_no_bos_that_the_tokenizer_adds(bos_added: bool, text: str) -> None:
    renderer = prompts_of("{{ bos_token }}{{ messages[0].content }}", bos_added=bos_added)
    assert renderer.render(chat()) == text
    assert renderer.tokenize(text) == (BOS, *b"hi")


@pytest.mark.parametrize("text", ["x", "<s>x"])
async def test_bos_is_added_once(text: str) -> None:
    renderer = prompts_of(None, bos_added=True)
    assert await renderer.tokenize_prompt(text) == (BOS, ord("x"))


@pytest.mark.parametrize("bos_added", [False, True])
@pytest.mark.parametrize(("add", "parse"), [(False, False), (False, True), (True, False), (True, True)])
async def test_added_and_special_tokens(bos_added: bool, add: bool, parse: bool) -> None:
    before = [BOS] if add and bos_added else []
    inside = [BOS, ord("x")] if parse else list(b"<s>x")
    renderer = prompts_of(None, bos_added=bos_added)
    assert await renderer.tokenize_text("<s>x", add_special=add, parse_special=parse) == [*before, *inside]
    assert await renderer.tokenize_text("", add_special=add, parse_special=parse) == before
    assert renderer.detokenize([BOS, ord("x"), 0xC3]) == "<s>x�"


async def test_special_tokens_of_the_template() -> None:
    renderer = prompts_of(None)
    assert (await renderer.tokenize_prompt(await renderer.render_chat(chat())))[0] == START


async def test_long_texts_run_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    async def run(self: WorkerPool, function: Any, *arguments: Any) -> Any:
        ran.append(getattr(function, "func", function).__name__)
        return function(*arguments)

    monkeypatch.setattr(WorkerPool, "run", run)
    renderer = prompts_of(None)
    expected_calls: dict[int, list[str]] = {100: [], LONG_TEXT_CHARS: ["render", "tokenize"]}
    for size, calls in expected_calls.items():
        text = await renderer.render_chat(chat({"role": "user", "content": "x" * size}))
        assert len(await renderer.tokenize_prompt(text)) > size
        assert ran == calls
    assert len(await renderer.tokenize_prediction(PredictedOutput("content", "x" * 100))) == 100
    assert len(await renderer.tokenize_prediction(PredictedOutput("content", "x" * LONG_TEXT_CHARS))) == LONG_TEXT_CHARS
    assert (
        len(await renderer.tokenize_text("x" * LONG_TEXT_CHARS, add_special=False, parse_special=False))
        == LONG_TEXT_CHARS
    )
    assert ran == ["render", "tokenize", "tokenize", "_tokenize_text"]
    renderer = prompts_of("<tool_call>{{ messages[0].content }}")
    await renderer.render_chat(chat(tools=[{"description": "x" * LONG_TEXT_CHARS}]))
    await renderer.render_chat(chat(*[HI] * 1000))
    assert ran[4:] == ["render", "render"]


def test_aliases_of_stop_and_max_tokens() -> None:
    request = msgspec.convert({"prompt": "x", "stop": "a", "n_predict": 7}, TextRequest)
    assert (request.stop_strings, request.token_limit) == (("a",), 7)
