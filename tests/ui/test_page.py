"""The page in a real browser: chat, origins of tokens, live view, keys, keyboard and small screens."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
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


def complete(url: str, max_tokens: int) -> int:
    """Generates outside of the browser. Returns the number of tokens."""
    body = {"prompt": "hi", "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)) as reply:
        return int(json.load(reply)["usage"]["completion_tokens"])


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
    send(page, "Say many words.", 120)
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


def test_stop_frees_the_slot_and_regenerate_goes_on(watched: WatchedPage) -> None:
    page = watched.connect()
    send(page, "Never end.", 2000)
    page.wait_for_selector("li.assistant .token")
    page.click("#stop")
    page.wait_for_selector("li.assistant p.facts:has-text('stopped')")
    expect(page.locator(BUSY)).to_have_count(0)
    page.evaluate("document.getElementById('set-max_tokens').value = 5")
    page.click("#regenerate")
    page.wait_for_selector(f"{DONE} p.facts:has-text('5 tokens')")
    assert page.locator("li.assistant").count() == 1


def test_a_schema_and_the_keyboard_alone(watched: WatchedPage) -> None:
    """Enter sends, Escape stops, arrows show the tip of each token, Tab reaches the buttons."""
    page = watched.connect()
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("Go on.")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.assistant .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("li.assistant p.facts:has-text('stopped')")
    page.keyboard.press("Shift+Tab")  # from the input to the messages
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.selected").count() == 1
    assert page.is_visible("#tip")
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
    assert json.loads(page.inner_text("li.assistant .text")) == {"a": "b"}
    assert page.locator("li.assistant .token[data-origin=forced]").count() > 0


def test_the_live_view_follows_eight_clients(watched: WatchedPage) -> None:
    page = watched.connect()
    with ThreadPoolExecutor(8) as clients:
        load = [clients.submit(complete, watched.url, 300) for _ in range(8)]
        expect(page.locator("#slots tr[data-state=decode]")).to_have_count(8)
        expect(page.locator("#running")).to_have_text("8")
        expect(page.locator("#rate")).to_have_text(re.compile("[1-9]"))
        assert page.is_visible("#proposers tbody tr")
        assert "full" in page.inner_text("#kv")
        assert [each.result() for each in load] == [300] * 8
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
    assert page.inner_text("li.assistant > .text") == "<b>bold</b> é"
    assert page.locator("li.assistant > .text .token").count() == len("<b>bold</b> é".encode())
    assert page.is_hidden(".reasoning .text")
    page.click(".reasoning summary")
    assert page.inner_text(".reasoning .text") == "Hm"
    page.click(".call summary")
    assert page.inner_text(".call pre") == '{"a": 1}'
    page.fill(".call textarea", "found")
    send(page, "So?", 5)
    expect(page.locator(DONE)).to_have_count(1)
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["user", "assistant", "tool", "user"]
    assert sent[1]["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "found"}


def test_a_long_answer_is_laid_out_once_a_frame(watched: WatchedPage) -> None:
    """Each look at the height of the messages lays out the whole answer; one for each event froze the page."""
    page = watched.connect()
    chunk = {"choices": [{"index": 0, "delta": {"content": "a "}, "token_origins": tokens("a ")}]}
    body = f"data: {json.dumps(chunk)}\n\n" * 2_000
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
    assert page.locator("li.assistant > .text .token").count() == 4_000
    assert page.evaluate("looks") < 1_000
    list_end = page.evaluate(
        "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
        "(document.getElementById('messages'))"
    )
    assert list_end < 2


def tokens(text: str) -> list[dict[str, Any]]:
    """Returns the entries of `token_origins` for a text with one token for each byte."""
    return [{"id": byte, "token": "", "bytes": [byte], "origin": "model"} for byte in text.encode()]
