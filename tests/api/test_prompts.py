"""Chat templates: the names they may use, what they are told, and what their failures become."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from api.config.server import ChatConfig
from api.schema.requests import ChatRequest, Prediction, TextRequest
from api.templates import prompts
from api.templates.prompts import Prompts
from engine import RequestRefused
from tests.api.fake import BOS, INFO, START, ByteVocab

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
HI = {"role": "user", "content": "hi"}


def prompts_of(own: str | None, *, bos_added: bool = False, **config: Any) -> Prompts:
    info = msgspec.structs.replace(INFO, chat_template=own, bos_added=bos_added)
    return Prompts(info, ByteVocab(bos_added=bos_added), ChatConfig(**config))


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return msgspec.convert({"messages": messages or [HI], **fields}, ChatRequest)


def render(template: str | None, *messages: dict[str, Any], **fields: Any) -> str:
    return prompts_of(template).render(chat(*messages, **fields))


def test_a_template_of_the_wild() -> None:
    assert render(SMOL) == (
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_if_there_is_none() -> None:
    made = prompts_of(None)
    assert made.render(chat()) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert made.trouble == "The model has no chat template; ChatML is used."
    assert prompts_of(SMOL).trouble is None


def test_without_generation_prompt() -> None:
    assert render(None, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("template", [None, SMOL])
@pytest.mark.parametrize("text", ["The answer is", "The answer is ", ""])
def test_the_last_message_goes_on(template: str | None, text: str) -> None:
    shown = render(template, HI, {"role": "assistant", "content": text}, continue_final_message=True)
    assert shown.endswith(f"<|im_start|>assistant\n{text}")


def test_the_last_message_goes_on_where_templates_strip() -> None:
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    said = {"role": "assistant", "content": "so far "}
    assert render(template, HI, said, continue_final_message=True) == "[hi][so far"


def test_a_last_message_that_is_not_shown_cannot_go_on() -> None:
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
        ("{{ tools is none }}{{ documents is none }}{{ nobody is defined }}", "TrueTrueFalse"),
    ],
)
def test_what_templates_may_use(template: str, text: str) -> None:
    assert render(template, chat_template_kwargs={"enable_thinking": False}) == text


def test_the_time() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "writes too much"),
        ("{{ 10 ** (10 ** 8) }}", "too large"),
        ("{% set n = namespace(n=3) %}{% for i in range(64) %}{% set n.n = n.n * n.n %}{% endfor %}", "too large"),
        ("{{ ('x' * 10 ** 12) | length }}", "too large"),
        ("{{ (10 ** 12 * [messages]) | length }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_failures_are_the_requests(template: str, complaint: str) -> None:
    with pytest.raises(RequestRefused, match=complaint):
        render(template)


def test_a_template_that_does_not_parse() -> None:
    made = prompts_of("{% if %}")
    assert made.trouble is not None
    assert made.template is None
    assert made.tokens("x") == (ord("x"),)
    with pytest.raises(RequestRefused, match="cannot be used"):
        made.render(chat())


def test_names_of_ours_win_over_a_clients() -> None:
    kwargs = {"messages": [], "bos_token": "evil", "self": 1, "add_generation_prompt": False}
    assert render("{{ bos_token }}{{ messages | length }}", chat_template_kwargs=kwargs) == "<s>1"


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"role": "user", "content": parts}
    assert render("{{ messages[0].content }}", said) == "a\nb"
    assert render(IN_PARTS, said) == "user:ab"
    assert render(IN_PARTS, HI) == "user:hi"


@pytest.mark.parametrize("text", ["so far", "so far ", ""])
def test_the_last_message_goes_on_in_parts(text: str) -> None:
    said = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": text}]}
    assert render(IN_PARTS, HI, said, continue_final_message=True) == f"user:hiassistant:a{text}"


SAID = {"role": "assistant", "content": "so far"}
CALLED = {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
NEW = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("said", "fields", "prefill", "end"),
    [
        (SAID, {}, True, "assistant\nso far"),
        (SAID, {}, False, NEW),
        (SAID, {"add_generation_prompt": True}, True, NEW),
        (SAID, {"add_generation_prompt": False}, True, "so far<|im_end|>\n"),
        (SAID, {"continue_final_message": False}, True, NEW),
        (SAID, {"continue_final_message": True}, False, "assistant\nso far"),
        (CALLED, {}, True, NEW),
        (HI, {}, True, NEW),
        (HI, {"continue_final_message": True}, True, "user\nhi"),
    ],
)
def test_who_speaks_next(said: dict[str, Any], fields: dict[str, Any], prefill: bool, end: str) -> None:
    made = prompts_of(None, prefill_assistant=prefill)
    assert made.render(chat(HI, said, **fields)).endswith(end)


def test_a_call_cannot_go_on() -> None:
    with pytest.raises(RequestRefused, match="tool calls cannot be continued"):
        render(None, HI, CALLED, continue_final_message=True)


def test_documents() -> None:
    template = "{% for d in documents or [] %}{{ d.title }}{% endfor %}"
    assert render(template, documents=[{"title": "a"}, {"title": "b"}]) == "ab"
    assert render(template, chat_template_kwargs={"documents": [{"title": "c"}]}) == "c"
    assert render(template) == ""


def test_the_servers_template_and_names() -> None:
    made = prompts_of(SMOL, template="{{ a }}{{ b }}{{ messages[0].content }}", template_kwargs='{"a": 1, "b": 2}')
    assert made.render(chat(chat_template_kwargs={"b": 3})) == "13hi"
    assert made.trouble is None
    assert prompts_of(None, template="chatml").trouble is None


def test_templates_of_requests() -> None:
    own = "{{ messages[0].content }}!"
    with pytest.raises(RequestRefused, match="--trust-request-chat-template") as caught:
        render(SMOL, chat_template=own)
    assert caught.value.field == "chat_template"
    made = prompts_of("{% if %}", trust_request_template=True)
    assert made.render(chat(chat_template=own)) == "hi!"
    assert made.render(chat(chat_template="gemma")).endswith("<start_of_turn>model\n")
    for broken in ("{% if %}", "lama3"):
        with pytest.raises(RequestRefused, match="chat_template cannot be used") as caught:
            made.render(chat(chat_template=broken))
        assert caught.value.field == "chat_template"


def test_a_template_that_fails_on_anything_is_told_at_start() -> None:
    made = prompts_of("{{ raise_exception('never') }}")
    assert made.trouble == "The chat template shows nothing of a user's plain message, or fails on it."
    with pytest.raises(RequestRefused, match="never"):
        made.render(chat())


def test_an_assistant_without_content() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    template = "{{ messages[1].content }}|{{ messages[1].tool_calls[0].function.name }}|{{ messages[2].tool_call_id }}"
    assert render(template, HI, said, {"role": "tool", "content": "r", "tool_call_id": "1"}) == "|f|1"


def test_no_calls_are_no_message_of_calls() -> None:
    assert render("{{ 'tool_calls' in messages[0] }}", {"role": "user", "content": "x", "tool_calls": []}) == "False"


def test_a_complaint_of_any_length() -> None:
    for template in ("{{ raise_exception('x' * 100000) }}", "{{ {}['x' * 100000] + 1 }}"):
        with pytest.raises(RequestRefused) as caught:
            render(template)
        assert len(str(caught.value)) < 700


def test_developers_are_system_to_templates_that_know_none() -> None:
    said = {"role": "developer", "content": "x"}
    assert render("{{ messages[0].role }}", said) == "system"
    assert render("{% if messages[0].role == 'developer' %}d{% endif %}", said) == "d"


@pytest.mark.parametrize("text", ["x", "<s>x"])
async def test_one_beginning_of_sequence(text: str) -> None:
    made = prompts_of(None, bos_added=True)
    assert await made.of_text(text) == (BOS, ord("x"))


@pytest.mark.parametrize("bos_added", [False, True])
@pytest.mark.parametrize(("add", "parse"), [(False, False), (False, True), (True, False), (True, True)])
async def test_pieces(bos_added: bool, add: bool, parse: bool) -> None:
    before = [BOS] if add and bos_added else []
    inside = [BOS, ord("x")] if parse else list(b"<s>x")
    made = prompts_of(None, bos_added=bos_added)
    assert await made.of_piece("<s>x", add=add, parse=parse) == [*before, *inside]
    assert await made.of_piece("", add=add, parse=parse) == before
    assert made.text_with_names_of([BOS, ord("x"), 0xC3]) == "<s>x�"


async def test_special_tokens_of_the_template_are_tokens() -> None:
    made = prompts_of(None)
    assert (await made.of_text(await made.text_of_chat(chat())))[0] == START


async def test_long_texts_go_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    async def run_sync(function: Any, *arguments: Any) -> Any:
        ran.append(getattr(function, "func", function).__name__)
        return function(*arguments)

    monkeypatch.setattr("anyio.to_thread.run_sync", run_sync)
    made = prompts_of(None)
    dues: dict[int, list[str]] = {100: [], prompts.LONG: ["render", "tokens"]}
    for size, due in dues.items():
        text = await made.text_of_chat(chat({"role": "user", "content": "x" * size}))
        assert len(await made.of_text(text)) > size
        assert ran == due
    assert len(await made.of_prediction(Prediction("content", "x" * 100))) == 100
    assert len(await made.of_prediction(Prediction("content", "x" * prompts.LONG))) == prompts.LONG
    assert len(await made.of_piece("x" * prompts.LONG, add=False, parse=False)) == prompts.LONG
    assert ran == ["render", "tokens", "tokenize", "_piece"]
    made = prompts_of("<tool_call>{{ messages[0].content }}")
    await made.text_of_chat(chat(tools=[{"description": "x" * prompts.LONG}]))
    await made.text_of_chat(chat(*[HI] * 1000))
    assert ran[4:] == ["render", "render"]


def test_stop_and_limit_under_all_their_names() -> None:
    asked = msgspec.convert({"prompt": "x", "stop": "a", "n_predict": 7}, TextRequest)
    assert (asked.stops, asked.limit) == (("a",), 7)
