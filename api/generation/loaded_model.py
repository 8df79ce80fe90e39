"""The loaded model and the state of the application, shared by all endpoints."""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path

from api.config.options import Options
from api.config.server import ServerConfig
from api.http.error_responses import ModelLoading, UnknownModel
from api.templates.prompts import PromptRenderer
from engine import Draining, Engine, EngineFault, ProposerType

PACELINE_VERSION = version("paceline")


class LoadedModel:
    """An open engine with the options, names and prompt renderer of its model."""

    def __init__(self, engine: Engine, options: Options) -> None:
        info = engine.info
        file = Path(info.path)
        self.engine = engine
        self.options = options
        self.name = options.server.alias or file.stem
        self.created = int(time.time())
        """Seconds since the epoch."""
        self.prompts = PromptRenderer(info, engine.vocab, options.chat)
        self.fingerprint = "fp_" + hashlib.sha256(f"{PACELINE_VERSION} {info.layout}".encode()).hexdigest()[:10]
        """A hash of Paceline's version and of `info.layout`: the model file, the library's build, the KV types and the
        attention kernel."""
        self._names = {self.name, file.name, file.stem, info.path}

    @property
    def default_proposers(self) -> tuple[ProposerType, ...]:
        """The proposer types of requests without a `speculative` field."""
        configured = self.options.speculation.default_types
        return tuple(kind for kind in self.engine.proposers if kind in configured or "auto" in configured)

    def check_name(self, name: str | None) -> None:
        """Raises UnknownModel if `name` is neither empty nor a name of this model."""
        if name and name not in self._names:
            raise UnknownModel(name, self.name)


class AppState:
    """The state of the application: loading, serving or draining."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.loaded: LoadedModel | None = None
        """The loaded model. None while the model loads."""
        self.draining = False

    @property
    def model(self) -> LoadedModel:
        """The loaded model. Raises ModelLoading, Draining, or the EngineFault that ended the engine."""
        if self.draining:
            raise Draining
        if self.loaded is None:
            raise ModelLoading
        if (fault := self.loaded.engine.fault) is not None:
            raise EngineFault(str(fault), fatal=True)
        return self.loaded
