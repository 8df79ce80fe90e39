from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from starlette.types import ASGIApp

from api.server.app import create_app
from tests.api.fake import FakeEngine, app_state, hello
from tests.api.server import Server

Apps = Callable[..., ASGIApp]


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """Removes the environment variables that servers read as flags."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("LLAMA_"):
                patch.delenv(name)
        yield


@pytest.fixture
def _unchanged_log() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "paceline", "paceline.native")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(hello)


@pytest.fixture
def app_of(engine: FakeEngine) -> Apps:
    """Returns a function that creates the application over `engine` with settings of the server."""

    def make(**config: Any) -> ASGIApp:
        return create_app(app_state(engine, **config))

    return make


@pytest.fixture
def app(app_of: Apps) -> ASGIApp:
    return app_of()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """A client of the test module's server."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client
