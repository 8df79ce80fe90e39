"""The loaded model and the state of the application, shared by all endpoints."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from prometheus_client.registry import Collector

from api.config.keys import configured_keys
from api.config.options import Options
from api.config.server import ServerConfig
from api.config.values import OptionError
from api.http.error_responses import ModelLoading, UnknownModel
from api.http.key_ring import KeyRing
from api.http.request_context import ErrorCounts
from api.http.response_counts import ResponseCounts
from api.templates.media_files import MediaFiles
from api.templates.prompts import PromptRenderer
from engine import Draining, Engine, EngineFault, ProposerType

PACELINE_VERSION = version("paceline")

_log = logging.getLogger("paceline")

# Maximum number and length of logged names of other models, so that clients can fill neither memory nor log.
_MAX_LOGGED_NAMES = 100
_MAX_LOGGED_CHARS = 128


class LoadedModel:
    """An open engine with the options, names and prompt renderer of its model."""

    def __init__(self, engine: Engine, options: Options) -> None:
        info = engine.info
        file = Path(info.path)
        self.engine = engine
        self.options = options
        self.aliases = options.server.alias or (file.stem,)
        """The names of the model in the API."""
        self.name = self.aliases[0]
        """The name in replies."""
        self.created = int(time.time())
        """Seconds since the epoch."""
        media = MediaFiles(engine.media, options.server)
        self.prompts = PromptRenderer(info, engine.vocab, options.chat, self._check_prompt_length, media)
        self.fingerprint = "fp_" + hashlib.sha256(f"{PACELINE_VERSION} {info.layout}".encode()).hexdigest()[:10]
        """A hash of Paceline's version and of `info.layout`: the model file, the library's build, the KV types and the
        attention kernel."""
        special = engine.vocab.special - engine.vocab.ends if options.generation.special else ()
        self.control_texts = tuple((token, engine.vocab.text(token)) for token in sorted(special))
        """The special tokens with their texts, if all outputs have these (`--special`); otherwise empty."""
        self._names = {*self.aliases, file.name, file.stem, info.path}
        self._strict = options.server.strict_model
        self._other_names: set[str] = set()

    @property
    def default_proposers(self) -> tuple[ProposerType, ...]:
        """The proposer types of requests without a `speculative` field."""
        configured = self.options.speculation.default_types
        return tuple(kind for kind in self.engine.proposers if kind in configured or "auto" in configured)

    def _check_prompt_length(self, tokens: int) -> None:
        """Raises ContextExceeded if no prompt of at least so many tokens can run."""
        if self.engine.info.generates and tokens >= self.engine.request_limit:
            raise self.engine.context_exceeded(tokens, at_least=True)

    def check_name(self, name: str | None) -> None:
        """Checks the `model` of a request. With `--strict-model`, raises UnknownModel for the name of another model;
        otherwise logs such a name once."""
        if not name or name in self._names:
            return
        if self._strict:
            raise UnknownModel(name, self.name)
        name = name[:_MAX_LOGGED_CHARS]
        if name not in self._other_names and len(self._other_names) < _MAX_LOGGED_NAMES:
            self._other_names.add(name)
            _log.info("%s serves requests for the model %r; --strict-model refuses them", self.name, name)

    def require_name(self, name: str) -> None:
        """Raises UnknownModel if `name` is not a name of this model."""
        if name not in self._names:
            raise UnknownModel(name, self.name)


class AppState:
    """The state of the application: loading, serving or draining."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises OptionError for an invalid file of keys."""
        self.config = config
        self.keys = KeyRing(configured_keys(config), required=config.has_keys)
        self.errors: ErrorCounts = Counter()
        self.responses = ResponseCounts()
        self.loaded: LoadedModel | None = None
        """The loaded model. None while the model loads."""
        self.loaded_share = 0.0
        """The loaded share of the model, 0 to 1."""
        self.draining = False
        self.collectors: list[Collector] = []
        """Further metrics of GET /metrics."""

    def reload_keys(self) -> None:
        """Reads the files of keys again. An invalid file is logged and changes nothing. If the files have no keys, only
        requests with a key of `--api-key` pass."""
        try:
            self.keys.replace(configured_keys(self.config))
        except OptionError as error:
            _log.error("%s; the earlier keys stay", error)
        else:
            files = " and ".join(filter(None, (self.config.keys, self.config.api_key_file)))
            _log.info("%s: %d API keys", files, len(self.keys))
            if not self.keys:
                _log.error("%s: no API key is valid; requests get 401 until a file has keys and SIGHUP reads it", files)

    @property
    def model(self) -> LoadedModel:
        """The loaded model. Raises ModelLoading, Draining, EngineStalled, or the EngineFault that ended the engine."""
        if self.draining:
            raise Draining
        if self.loaded is None:
            raise ModelLoading(self.loaded_share)
        if (fault := self.loaded.engine.fault) is not None:
            raise EngineFault(str(fault), fatal=True)
        if (stall := self.loaded.engine.stall) is not None:
            raise stall
        return self.loaded
