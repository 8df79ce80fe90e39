"""What is served, once it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from api.config.flags import Options
from api.config.server import ServerConfig
from api.http.error_responses import Loading, UnknownModel
from api.templates.prompts import Prompts
from engine import (
    ContextExceeded,
    Draining,
    EngineFault,
    Form,
    Generation,
    Grammar,
    MemoryInfo,
    ModelInfo,
    Moved,
    ProposerType,
    Request,
    SlotState,
    Stats,
    Vocab,
)

VERSION = version("paceline")


class Core(Protocol):
    """What the endpoints need of `engine.Engine`."""

    @property
    def info(self) -> ModelInfo:
        """The model."""

    @property
    def vocab(self) -> Vocab:
        """Its tokens."""

    @property
    def slots(self) -> int:
        """Requests decoded together."""

    @property
    def places(self) -> int:
        """Requests that may run or wait at once."""

    @property
    def fault(self) -> EngineFault | None:
        """Why it serves nothing more, if it failed for good."""

    @property
    def request_limit(self) -> int:
        """Tokens of prompt and output that one request may have."""

    def context_exceeded(self, prompt_tokens: int) -> ContextExceeded:
        """The refusal of a prompt of so many tokens, with the flags that would help."""

    @property
    def proposers(self) -> tuple[ProposerType, ...]:
        """The types that a request may ask to guess."""

    @property
    def silent(self) -> Mapping[str, str]:
        """The other types, each with the reason."""

    @property
    def memory(self) -> MemoryInfo:
        """How prefixes are kept."""

    async def compile(self, form: Form) -> Grammar:
        """What a request's `grammar` takes. Raises RequestRefused; its field is the JSON pointer of a keyword."""

    def generate(self, request: Request) -> Generation:
        """Not yet submitted. Raises RequestRefused."""

    async def slot_states(self) -> tuple[SlotState, ...]:
        """The slots. Raises EngineFault."""

    async def save_slot(self, number: int, path: Path) -> Moved:
        """Writes what a slot ran last to a file. Raises RequestRefused or EngineFault."""

    async def restore_slot(self, number: int, path: Path) -> Moved:
        """Gives a slot what such a file has. Raises RequestRefused or EngineFault."""

    async def erase_slot(self, number: int) -> int:
        """Forgets what a slot ran last; how many tokens. Raises RequestRefused or EngineFault."""

    def stats(self) -> Stats:
        """A snapshot."""


class Served:
    """An open engine, with what every request to it needs."""

    def __init__(self, engine: Core, options: Options) -> None:
        info = engine.info
        file = Path(info.path)
        self.engine = engine
        self.options = options
        self.name = options.server.alias or file.stem
        self.created = int(time.time())
        self.prompts = Prompts(info, engine.vocab, options.chat)
        self.fingerprint = "fp_" + hashlib.sha256(f"{VERSION} {info.layout}".encode()).hexdigest()[:10]
        self._names = {self.name, file.name, file.stem, info.path}

    @property
    def guessers(self) -> tuple[ProposerType, ...]:
        """Who guesses for requests that do not say."""
        chosen = self.options.speculation.chosen
        return tuple(kind for kind in self.engine.proposers if kind in chosen or "auto" in chosen)

    def check_model(self, asked: str | None) -> None:
        """Raises UnknownModel unless `asked` is absent or means this one."""
        if asked and asked not in self._names:
            raise UnknownModel(asked, self.name)


class Site:
    """The server as clients find it: loading, serving or about to end."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.served: Served | None = None
        self.draining = False

    @property
    def open(self) -> Served:
        """What is served. Raises Loading, Draining or the engine's last fault."""
        if self.draining:
            raise Draining
        if self.served is None:
            raise Loading
        if (fault := self.served.engine.fault) is not None:
            raise EngineFault(str(fault), fatal=True)
        return self.served
