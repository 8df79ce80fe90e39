"""Chat templates in the style of real families: rendering, capabilities, names and settings."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from api.config.server import ChatConfig
from api.templates import chat_template as templates
from api.templates.builtin import BUILTIN_TEMPLATES
from api.templates.chat_template import (
    ChatTemplate,
    InvalidTemplate,
    compile_template,
    configured_kwargs,
    configured_template,
    resolve_template,
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def render(source: str, messages: list[dict[str, Any]] = TALK, **names: Any) -> str:
    given = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
    return ChatTemplate(source).render({**given, "messages": messages, **names})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello"
            "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi  [/INST] Hello </s><s>[INST] Bye [/INST]",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "llama4",
            "<s><|header_start|>system<|header_end|>\n\nBe brief.<|eot|><|header_start|>user<|header_end|>\n\nHi<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\nHello<|eot|><|header_start|>user<|header_end|>\n\nBye<|eot|>"
            "<|header_start|>assistant<|header_end|>\n\n",
        ),
        ("mistral-v1", "<s> [INST] Be brief.\n\nHi  [/INST] Hello</s> [INST] Bye [/INST]"),
        ("mistral-v3", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye[/INST]"),
        ("mistral-v3-tekken", "<s>[INST]Be brief.\n\nHi [/INST]Hello</s>[INST]Bye[/INST]"),
        (
            "mistral-v7",
            "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi [/INST] Hello</s>[INST] Bye[/INST]",
        ),
        (
            "mistral-v7-tekken",
            "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi [/INST]Hello</s>[INST]Bye[/INST]",
        ),
        (
            "gemma",
            "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "phi3",
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi <|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n"
            "<|assistant|>\n",
        ),
        (
            "phi4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi <|im_end|>"
            "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>",
        ),
        (
            "falcon3",
            "<|system|>\nBe brief.\n<|user|>\nHi \n<|assistant|>\nHello\n<|user|>\nBye\n<|assistant|>\n",
        ),
        (
            "zephyr",
            "<|system|>\nBe brief.</s>\n<|user|>\nHi </s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n"
            "<|assistant|>\n",
        ),
        (
            "openchat",
            "<s>Be brief.<|end_of_turn|>GPT4 Correct User: Hi <|end_of_turn|>GPT4 Correct Assistant: Hello"
            "<|end_of_turn|>GPT4 Correct User: Bye<|end_of_turn|>GPT4 Correct Assistant:",
        ),
        ("vicuna", "<s>Be brief.\n\nUSER: Hi \nASSISTANT: Hello</s>\nUSER: Bye\nASSISTANT:"),
        (
            "deepseek3",
            "<s>Be brief.\n\n<｜User｜>Hi <｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>",
        ),
        (
            "command-r",
            "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
            "<|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        (
            "granite",
            "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi "
            "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>Hello<|end_of_text|>\n<|start_of_role|>user"
            "<|end_of_role|>Bye<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        ),
    ],
)
def test_built_in_templates(name: str, text: str) -> None:
    assert render(BUILTIN_TEMPLATES[name]) == text


def test_capabilities_of_built_in_templates() -> None:
    for source in BUILTIN_TEMPLATES.values():
        template = ChatTemplate(source)
        assert template.accepts_text
        assert template.capabilities.supports_system_role
        assert not template.accepts_parts


# In the style of Qwen: tools in the system message, calls as JSON in tags, results in the user's turn.
TAGS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and (loop.index0 > ns.last or preserve_thinking) %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# In the style of Mistral: turns must alternate, and another order is an error.
STRICT = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Turns must alternate: user, assistant, user...") }}
    {%- endif %}
    {%- if turn["role"] == "user" %}
        {{- "[INST] " + (system + "\\n\\n" if loop.last and system is defined else "") + turn["content"] + "[/INST]" }}
    {%- else %}
        {%- generation %}{{- " " + turn["content"] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
# In the style of Gemma: content parts, system text in the first user turn, roles of its own.
PARTS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set first = (system if system is string else system[0]['text']) + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '
' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model
' }}{%- endif -%}
"""
# In the style of vision models: content parts only.
ONLY_PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}:"
    "{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
# In the style of Llama: the date, tools as indented JSON in the first user's turn, one call at a time.
DATED = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("Only one call at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- for t in tools or [] if message == messages[0] %}
            {{- t | tojson(indent=4) + "\\n\\n" }}
        {%- endfor %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
"""
EFFORT = "{{ reasoning_effort | default('medium') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "<é>", "parameters": {"type": "object"}}}


def calling(*arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_tools_in_tags() -> None:
    results = [{"role": "tool", "content": "sun"}, {"role": "tool", "content": "rain"}]
    messages = [USER, calling({"at": "Köln"}, '{"at": "Rom"}'), *results]
    assert render(TAGS, messages, tools=[TOOL], enable_thinking=False) == (
        "<|im_start|>system\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "description": "<é>", "parameters": {"type": "object"}}}'
        "\n</tools><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '\n<tool_call>\n{"name": "weather", "arguments": {"at": "Köln"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"at": "Rom"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_turns_that_alternate() -> None:
    assert render(STRICT) == "<s>[INST] Hi [/INST] Hello</s>[INST] Be brief.\n\nBye[/INST]"
    with pytest.raises(
        Exception, match=r"refuses this conversation: Turns must alternate: user, assistant, user\.\.\."
    ):
        render(STRICT, [USER, USER])


def test_parts() -> None:
    parts = [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [TALK[0], {"role": "user", "content": parts}, TALK[2]]
    assert render(PARTS, messages) == (
        "<s><start_of_turn>user\nBe brief.\n\nab<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_a_date_and_indented_tools() -> None:
    shown = render(DATED, [USER, calling({"at": "Köln"})], tools=[TOOL], date_string="1 May 2026")
    assert shown == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 1 May 2026\n<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{json.dumps(TOOL, indent=4, ensure_ascii=False)}\n\nHi<|eot_id|>"
        '{"name": "weather", "parameters": {"at": "Köln"}}<|eot_id|>'
    )


def test_the_scope_of_generation() -> None:
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert render(source) == "21"


@pytest.mark.parametrize(
    ("source", "able"),
    [
        (
            TAGS,
            "string_content tools tool_calls parallel_tool_calls system_role preserve_reasoning object_arguments",
        ),
        (STRICT, "string_content system_role"),
        (PARTS, "string_content typed_content system_role"),
        (ONLY_PARTS, "typed_content"),
        (DATED, "string_content system_role tools tool_calls object_arguments"),
        (EFFORT, "string_content system_role reasoning_effort"),
        ("{{ raise_exception('no') }}", ""),
        ("nothing", ""),
        ("{{ messages }}", "string_content system_role tool_calls parallel_tool_calls preserve_reasoning"),
    ],
    ids=["tags", "strict", "parts", "only parts", "dated", "effort", "refuses", "constant", "repr"],
)
def test_capabilities(source: str, able: str) -> None:
    found = ChatTemplate(source).capabilities
    names = able.split()
    assert {name for name in found.__struct_fields__ if getattr(found, name)} == {f"supports_{name}" for name in names}


def test_adapted_messages() -> None:
    def adapted(source: str, content: Any, role: str = "user") -> Any:
        return ChatTemplate(source).adapted({"role": role, "content": content})

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert adapted(TAGS, parts) == {"role": "user", "content": "a\nb"}
    assert adapted(PARTS, parts) == {"role": "user", "content": parts}
    assert adapted(PARTS, "a") == {"role": "user", "content": "a"}
    assert adapted(ONLY_PARTS, "a") == {"role": "user", "content": parts[:1]}
    assert adapted(ONLY_PARTS, "") == {"role": "user", "content": ""}
    assert adapted(TAGS, "a", "developer")["role"] == "system"
    assert adapted(TAGS + "{# developer #}", "a", "developer")["role"] == "developer"


def test_an_endless_template_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = Event(), Event()

    def wait(form: str) -> None:
        begun.set()
        go_on.wait(5)

    monkeypatch.setitem(templates._ENVIRONMENT.globals, "strftime_now", wait)
    slow = ChatTemplate("{{ strftime_now('') }}")
    thread = Thread(target=lambda: slow.accepts_text)
    thread.start()
    assert begun.wait(5)
    assert ChatTemplate("{{ messages[0].content }}").accepts_text
    assert thread.is_alive()
    go_on.set()
    thread.join()


def test_templates_by_name() -> None:
    assert resolve_template("chatml") == BUILTIN_TEMPLATES["chatml"]
    for text in ("{{ messages }}", "This is not a chat template, it is"):
        assert resolve_template(text) == text
    with pytest.raises(InvalidTemplate, match="there is no chat template named 'llama33'; the nearest is llama3"):
        resolve_template("llama33")
    assert compile_template("chatml") is compile_template("chatml")


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "my.jinja"
    file.write_text("{{ 'é' }}", "utf-8")
    assert configured_template(ChatConfig()) is None
    assert configured_template(ChatConfig(template="gemma")) == BUILTIN_TEMPLATES["gemma"]
    assert configured_template(ChatConfig(template_file=str(file))) == "{{ 'é' }}"
    assert configured_kwargs(ChatConfig()) == {}
    assert configured_kwargs(ChatConfig(template_kwargs='{"enable_thinking": false}')) == {"enable_thinking": False}
    thinking = ChatConfig(reasoning="on", reasoning_effort="low", template_kwargs='{"enable_thinking": false, "a": 1}')
    effort = {"reasoning_effort": "low", "reasoning_strength": "low"}
    assert configured_kwargs(thinking) == {"a": 1, "enable_thinking": True, "thinking": True, **effort}
    kept = configured_kwargs(ChatConfig(preserve_reasoning=False))
    assert (kept["preserve_thinking"], kept["clear_thinking"]) == (False, True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"template": "x"}, "--chat-template: there is no chat template named 'x'"),
        ({"template": "chatml", "template_file": "x"}, "exclude each other"),
        ({"template_file": "/nowhere/x.jinja"}, "--chat-template-file: cannot read /nowhere/x.jinja: No such file"),
        ({"template_kwargs": "[1]"}, "--chat-template-kwargs: expected a JSON object"),
        ({"template_kwargs": "{'a': 1}"}, "--chat-template-kwargs: expected a JSON object"),
    ],
)
def test_invalid_settings(config: dict[str, Any], message: str) -> None:
    chat_config = ChatConfig(**config)
    with pytest.raises(InvalidTemplate, match=message):
        _ = configured_template(chat_config), configured_kwargs(chat_config)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unheard_of %}", "{{ x | unheard_of }}"])
def test_invalid_jinja(source: str) -> None:
    with pytest.raises(InvalidTemplate, match=r"\(line 1\)"):
        ChatTemplate(source)
