"""The page in a real browser: chat, origins of tokens, live view, keys, keyboard and small screens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Page, Route, expect

from tests.ui.conftest import CHROMIUM, KEY, WatchedPage

if CHROMIUM is None:
    pytest.skip(
        "there is no chromium: run `apt-get install chromium`, then `.venv/bin/pytest tests/ui`",
        allow_module_level=True,
    )

BUSY = "#slots tbody tr:not([data-state=idle])"
DONE = "li.assistant:last-child[aria-busy=false]"


def send(page: Page, text: str, max_tokens: int) -> None:
    """Sends a message from the keyboard, with a limit of tokens."""
    page.evaluate(f"document.getElementById('set-max_tokens').value = {max_tokens}")
    page.focus("#input")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def stream(url: str) -> AbstractContextManager[Any]:
    """Generates outside of the browser, until the `with` block ends."""
    body = {"prompt": "hi", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    reply: AbstractContextManager[Any] = urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode(), headers))
    return reply


def ignore_end_tokens(page: Page) -> None:
    """Makes the answers of the simulated model, which end at random, go on to the limit of tokens."""

    def forward(route: Route) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data or ""), "ignore_eos": True}))

    page.route("**/v1/chat/completions", forward)


def distance_to_end(page: Page) -> float:
    """Returns the pixels between the visible part of the messages and their end."""
    sizes = "({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight"
    return float(page.eval_on_selector("#messages", sizes))


def test_the_page_asks_for_a_key_and_keeps_it(watched: WatchedPage) -> None:
    page = watched.page
    watched.enter_key("wrong")
    page.wait_for_selector("#key-error:has-text('does not know this key')")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#status[data-state=connected]")
    assert not page.is_visible("#key-dialog")
    page.reload()
    page.wait_for_selector("#status[data-state=connected]")
    assert not page.is_visible("#key-dialog")
    refused = [error for error in watched.errors if "401" in error]
    assert refused
    assert refused == watched.errors
    watched.errors.clear()


def test_the_colours_of_tokens_agree_with_the_usage(watched: WatchedPage) -> None:
    page = watched.connect()
    page.evaluate("document.getElementById('set-seed').value = 7")
    page.evaluate("document.getElementById('set-system').value = `It's a \\\\ \"test\"\\n$HOME é`")
    send(page, "Say 'many' words.", 120)
    page.wait_for_selector("li.assistant[aria-busy=true] .token")  # the text is shown before its end
    page.wait_for_selector(DONE)
    origins = page.eval_on_selector_all("li.assistant .token", "all => all.map(each => each.dataset.origin)")
    drafted = [origin for origin in origins if origin not in ("model", "forced")]
    facts = page.locator("li.assistant p.facts")
    tokens, accepted = (int(facts.get_attribute(f"data-{name}") or 0) for name in ("tokens", "accepted"))
    ends = tokens - len(origins)  # an end token has no entry, and can be drafted
    assert 0 <= accepted - len(drafted) <= ends <= 1
    assert drafted
    chips = page.eval_on_selector_all("li.assistant .chip", "all => all.map(each => Number(each.dataset.count))")
    assert sum(chips) == len(origins)
    page.hover("li.assistant .token >> nth=3")
    assert "logprob" in page.inner_text("#tip")
    page.uncheck("#show-origins")
    page.hover("li.assistant .token >> nth=5")
    assert page.is_hidden("#tip")
    page.click("#last-request summary")
    assert '"token_origins": true' in page.inner_text("#curl")
    assert "extra_body" in page.inner_text("#python")
    assert KEY not in page.inner_text("#last-request")
    outputs = outputs_of(["sh", "-c", page.inner_text("#curl")], [sys.executable, "-c", page.inner_text("#python")])
    assert outputs[0].endswith("data: [DONE]\n\n")
    assert outputs[1] == page.text_content("li.assistant .text")


def outputs_of(*commands: Sequence[str]) -> list[str]:
    """Runs commands at the same time. Returns what each has printed."""
    settings = {**os.environ, "PACELINE_API_KEY": KEY}
    processes = [subprocess.Popen(each, env=settings, stdout=subprocess.PIPE, text=True) for each in commands]
    return [process.communicate()[0] for process in processes]


def test_stop_frees_the_slot_and_regenerate_goes_on(watched: WatchedPage) -> None:
    page = watched.connect()
    ignore_end_tokens(page)
    page.set_viewport_size({"width": 1280, "height": 360})
    send(page, "Never end.", 2000)
    expect(page.locator(".token").nth(120)).to_be_attached()  # the answer is longer than the list is high
    page.hover("#messages")
    page.mouse.wheel(0, -100)  # a reader who scrolls up is not pulled to the end
    expect(page.locator(".token").nth(250)).to_be_attached()
    assert distance_to_end(page) > 100
    page.click("#stop")
    page.wait_for_selector("li.assistant p.facts:has-text('stopped')")
    expect(page.locator(BUSY)).to_have_count(0)
    assert distance_to_end(page) > 100
    page.evaluate("document.getElementById('set-max_tokens').value = 5")
    page.click("#regenerate")
    page.wait_for_selector(f"{DONE} p.facts:has-text('5 tokens')")
    assert page.locator("li.assistant").count() == 1
    answer = (page.text_content("li.assistant .text") or "").strip()
    expect(page.locator("#announcement")).to_have_text(answer)  # for screen readers


def test_an_earlier_message_is_edited_and_an_answer_copied(watched: WatchedPage) -> None:
    page = watched.connect()
    for text in ("One", "Two"):
        send(page, text, 3)
        page.wait_for_selector(f"{DONE} p.facts")
    page.click("li.assistant button:has-text('Copy') >> nth=0")
    expect(page.locator("#announcement")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.text_content("li.assistant .text >> nth=0")
    page.click("button:has-text('Edit') >> nth=1")
    page.keyboard.press("Escape")
    assert (page.input_value("#input"), page.is_visible("#editing")) == ("", False)
    page.click("button:has-text('Edit') >> nth=0")
    send(page, " more", 3)
    expect(page.locator("li.assistant")).to_have_count(1)
    page.wait_for_selector(f"{DONE} p.facts")
    assert page.locator("li.user .text").all_inner_texts() == ["One more"]


def test_a_schema_and_the_keyboard_alone(watched: WatchedPage) -> None:
    """Enter sends, Escape stops, arrows show the tip of each token, Tab reaches the buttons."""
    page = watched.connect()
    assert page.evaluate("document.activeElement.id") == "input"
    ignore_end_tokens(page)
    page.keyboard.type("Go on.")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.assistant .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("li.assistant p.facts:has-text('stopped')")
    page.unroute("**/v1/chat/completions")
    page.keyboard.press("Shift+Tab")  # from the input to the messages
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.selected").count() == 1
    assert page.is_visible("#tip")
    while page.evaluate("document.activeElement.id") != "input":  # over Edit and Copy
        page.keyboard.press("Tab")
    for _ in range(3):  # from the input over Send and Regenerate to the settings
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.focus("#set-schema")
    page.keyboard.type(
        '{"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"], "additionalProperties": false}'
    )
    page.focus("#send")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert json.loads(page.text_content("li.assistant .text") or "") == {"a": "b"}
    assert page.locator("li.assistant .token[data-origin=forced]").count() > 0


def test_the_live_view_follows_eight_clients(watched: WatchedPage) -> None:
    page = watched.connect()
    with ExitStack() as load:
        for _ in range(8):
            load.enter_context(stream(watched.url))
        expect(page.locator("#slots tr[data-state=decode]")).to_have_count(8)
        expect(page.locator("#running")).to_have_text("8")
        expect(page.locator("#rate")).to_have_text(re.compile("[1-9]"))
        assert page.is_visible("#proposers tbody tr")
        expect(page.locator("h2 >> text=KV cache")).to_have_text(re.compile("KV cache: [1-9]+ % full"))
        expect(page.locator("#saved")).to_have_text(re.compile("simulated helped most"))
        expect(page.locator("#busy")).to_have_text("8 of 8")
    expect(page.locator(BUSY)).to_have_count(0)
    expect(page.locator("#running")).to_have_text("0")


def test_a_small_screen_and_the_loading_bar(watched: WatchedPage) -> None:
    page = watched.connect()
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.is_hidden("#live")
    page.click("#tab-live")
    assert page.is_visible("#slots")
    assert page.is_hidden("#chat")
    body = json.dumps({"error": {"message": "Loading model", "code": 503, "progress": 0.4}})
    page.route("**/v1/paceline/events", lambda route: route.fulfill(status=503, body=body))
    page.reload()
    page.wait_for_selector("#loading:has-text('40 %')")
    page.unroute("**/v1/paceline/events")
    page.wait_for_selector("#status[data-state=connected]")
    assert page.is_hidden("#loading")
    watched.errors[:] = [error for error in watched.errors if "503" not in error]


def test_reasoning_and_calls_are_folded_and_markup_is_text(watched: WatchedPage) -> None:
    """The answer is scripted, with the tokens of tags that the deltas do not contain."""
    page = watched.connect()
    sent: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        sent.append(json.loads(route.request.post_data or ""))
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
        deltas: list[tuple[dict[str, Any], str]] = [
            ({"role": "assistant", "content": None}, ""),
            ({"reasoning_content": "Hm"}, "<think>Hm"),
            ({"content": "<b>bold</b> é"}, "</think>\n<b>bold</b> é"),
            ({"tool_calls": [call]}, "<call>"),
        ]
        chunks = [{"choices": [{"index": 0, "delta": delta, "token_origins": tokens(text)}]} for delta, text in deltas]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    send(page, "<i>Hi</i>", 5)
    page.wait_for_selector(DONE)
    assert page.text_content("li.assistant > .text") == "<b>bold</b> é"
    assert page.locator("li.assistant > .text .token").count() == len("<b>bold</b> é".encode())
    assert page.is_hidden(".reasoning .text")
    page.click(".reasoning summary")
    expect(page.locator(".reasoning .text")).to_have_text("Hm")
    page.click(".call summary")
    assert page.inner_text(".call pre") == '{"a": 1}'
    page.fill(".call textarea", "found")
    send(page, "So?", 5)
    expect(page.locator(DONE)).to_have_count(1)
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["user", "assistant", "tool", "user"]
    assert sent[1]["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "found"}


def test_a_long_answer_is_laid_out_once_a_frame_and_in_view_only(watched: WatchedPage) -> None:
    """Each read of the height of the messages makes the browser lay out the end of the answer. One read for each event
    froze the page, and so did a layout of 20,000 tokens."""
    page = watched.connect()
    line = "a" * 39 + "\n"
    chunk = {"choices": [{"index": 0, "delta": {"content": line}, "token_origins": tokens(line)}]}
    body = f"data: {json.dumps(chunk)}\n\n" * 500
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.evaluate(
        """() => {
            const { get } = Object.getOwnPropertyDescriptor(Element.prototype, "scrollHeight");
            window.looks = 0;
            const counted = { get() { window.looks++; return get.call(this); } };
            Object.defineProperty(Element.prototype, "scrollHeight", counted);
        }"""
    )
    send(page, "Go", 5)
    expect(page.locator(DONE)).to_have_count(1)
    assert page.locator("li.assistant > .text .token").count() == 20_000
    assert page.evaluate("looks") < 250
    expect(page.locator("li.assistant .facts").first).to_be_in_viewport()
    assert distance_to_end(page) < 2
    assert page.evaluate("document.querySelector('li.assistant .text').textContent") == line * 500
    laid_out = page.eval_on_selector_all(
        ".block", "all => all.map(each => each.firstChild.checkVisibility({ contentVisibilityAuto: true }))"
    )
    assert len(laid_out) == -(-20_000 // 120)  # the first line break after 100 tokens
    assert laid_out[-1]
    assert sum(laid_out) < 60


def tokens(text: str) -> list[dict[str, Any]]:
    """Returns the entries of `token_origins` for a text with one token for each byte."""
    return [{"id": byte, "token": "", "bytes": [byte], "origin": "model"} for byte in text.encode()]
