"""Fixtures of the browser tests: Debian's chromium, a server with the simulated model, and a page that is watched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.api.server import Server

KEY = "secret"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_TIMEOUT_MS = 20_000
# Steps of 20 ms: a stop or a change of the slots shows in time.
_SERVER = ("--sim", "--sim-accept", "0.7", "-np", "8", "-c", "16384", "--port", "0", "--api-key", KEY)


# The server loads while the browser starts.
@pytest.fixture(scope="module")
def started_server() -> Iterator[Server]:
    server = Server(*_SERVER)
    yield server
    server.close()


# Playwright runs an event loop until it stops, so it must stop before the asynchronous tests of other modules.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=_TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(started_server: Server, browser: Browser) -> Server:
    """A server with an API key."""
    started_server.ready()
    return started_server


class WatchedPage:
    """A page of the server, with the errors in its console and the hosts of its requests."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(_TIMEOUT_MS)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def enter_key(self, key: str = KEY) -> None:
        """Opens the page and enters the API key."""
        self.page.goto(self.url)
        self.page.fill("#key", key)
        self.page.keyboard.press("Enter")

    def connect(self) -> Page:
        """Opens the page with the key. Returns the page when the live view is connected."""
        self.enter_key()
        self.page.wait_for_selector("#status[data-state=connected]")
        expect(self.page.locator("#slots tbody tr")).to_have_count(8)
        return self.page


@pytest.fixture
def watched(server: Server, browser: Browser) -> Iterator[WatchedPage]:
    """A page in a fresh browser profile. At the end no request went to another host, and the console has no error."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    watched = WatchedPage(context.new_page(), server.url)
    yield watched
    context.close()
    assert watched.errors == []
    assert watched.hosts <= {urlsplit(server.url).netloc}
