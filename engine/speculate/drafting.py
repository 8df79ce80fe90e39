"""All speculation of one engine: what proposers share, whom each request gets, and one draft for everybody a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from msgspec import structs

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, Drafts, ProposerType, Request, Speculation
from engine.grammar import Matcher
from engine.pace import Chooser, Load, StepCost
from engine.sampling import Sampler
from engine.speculate.base import Bounds, Draft, Proposer
from engine.speculate.draft import DraftModel, DraftSequence
from engine.speculate.drafter import Drafter
from engine.speculate.forced import Forced
from engine.speculate.guesser import Book
from engine.speculate.map import NgramMapK, NgramMapK4v
from engine.speculate.prediction import Prediction
from engine.speculate.proposals import Proposals, Wish
from engine.speculate.shared import Shared
from engine.speculate.simple import NgramSimple
from engine.speculate.suffix import Suffix
from engine.speculate.tally import acceptance_line

log = logging.getLogger("paceline.speculation")

PLACES = 16
"""Places that a request may make the draft model guess if the engine's own bound is lower: everybody waits for them."""

Speculate = Callable[[Request], Mapping[str, Proposer]]
"""Makes the proposers of a request, by type: another choice of them, for tests and experiments."""


class Drafting:
    """What the engine thread knows about guessing. `close` saves what is to outlive it."""

    def __init__(
        self,
        shared: Shared,
        config: SpeculationConfig,
        draft: DraftConfig,
        model: DraftModel | None = None,
        speculate: Speculate | None = None,
        cost: StepCost | None = None,
    ) -> None:
        """`cost` is that of the model's steps; without one nothing is verified but in a fixed order."""
        self.model = model
        self.chooser = Chooser(cost or StepCost())
        self._proposals = Proposals(self.chooser, model)
        self._shared = shared
        self._config = config
        self._draft = draft
        self._speculate = speculate
        self._default = Speculation(type=config.chosen)
        self._books: dict[str, Book] = {}

    @property
    def drafts(self) -> tuple[Drafts, ...]:
        """What became of all requests' drafts, by type. Any thread may ask."""
        return tuple(book.drafts for book in list(self._books.values()))

    @property
    def fault(self) -> str:
        """Why the draft model drafts no more, if it failed. Any thread may call it."""
        return self.model.fault if self.model is not None else ""

    def drafter(self, request: Request, sampler: Sampler | None = None, matcher: Matcher | None = None) -> Drafter:
        """The drafter of a new request, whose tokens are picked by `sampler`; the likeliest without one. Nobody drafts
        what the grammar at `matcher` forbids."""
        asked = self._asked(request)
        proposers = self._speculate(request) if self._speculate else self.proposers(request, sampler, matcher)
        for name in proposers:
            self._books.setdefault(name, Book.new(name))
        permits = matcher.permits if matcher is not None else None
        bounds = Bounds(asked.n_max, asked.n_min or 0, asked.p_min or 0.0, permits)
        fixed = (asked.order or self._config.order) == "fixed"
        return Drafter(proposers, books=self._books, bounds=bounds, fixed=fixed)

    def propose(self, wishes: Sequence[Wish], reading: Sequence[Drafter], load: Load, seconds: float) -> list[Draft]:
        """What the next step is to verify for each of `wishes`; see `Proposals.make`."""
        return self._proposals.make(wishes, reading, load, seconds)

    def report(self, drafter: Drafter) -> None:
        """Logs what became of a request's drafts, and of those of its types since the start."""
        if not drafter.types or not log.isEnabledFor(logging.INFO):
            return
        log.info("%s", acceptance_line(drafter.drafts))
        for name in drafter.types:
            log.info("%s", self._books[name].tally)

    def close(self) -> None:
        """Saves what was learnt, as far as files were named."""
        self._shared.save()

    # ── whom a request gets ──

    def _asked(self, request: Request) -> Speculation:
        """What the request, or for want of that the engine, says."""
        asked = self._default if request.speculation is None else request.speculation
        if request.prediction and (asked.type or request.speculation is None):
            return structs.replace(asked, type=(*asked.type, "prediction"))
        return asked

    def proposers(
        self, request: Request, sampler: Sampler | None = None, matcher: Matcher | None = None
    ) -> dict[str, Proposer]:
        """The proposers of a request, by type."""
        asked = self._asked(request)
        wanted = PROPOSER_TYPES if "auto" in asked.type else [kind for kind in PROPOSER_TYPES if kind in asked.type]
        made = {kind: self._make(kind, request, asked, sampler, matcher) for kind in wanted}
        return {kind: proposer for kind, proposer in made.items() if proposer is not None}

    def _make(
        self,
        kind: ProposerType,
        request: Request,
        asked: Speculation,
        sampler: Sampler | None,
        matcher: Matcher | None,
    ) -> Proposer | None:
        config, shared = self._config, self._shared
        match kind:
            case "prediction":
                return Prediction(request.prediction, len(request.prompt)) if request.prediction else None
            case "grammar":
                return Forced(matcher) if matcher is not None else None
            case "ngram-simple":
                return NgramSimple(*self._sizes("simple", asked))
            case "ngram-map-k":
                return NgramMapK(*self._sizes("map_k", asked))
            case "ngram-map-k4v":
                return NgramMapK4v(*self._sizes("map_k4v", asked))
            case "ngram-mod":
                n_min = config.mod_min if asked.n_min is None else asked.n_min
                return shared.mod(request.salt, n_min, max(config.mod_max, asked.n_max or 0))
            case "ngram-cache":
                return shared.cache(request.salt, asked.n_max or config.cache_max)
            case "suffix":
                return Suffix(
                    shared.outputs,
                    request.salt,
                    len(request.prompt),
                    depth=config.suffix_depth,
                    factor=config.suffix_factor,
                    p_min=config.suffix_p_min if asked.p_min is None else asked.p_min,
                )
            case "draft":
                return self._draft_sequence(request, asked, sampler)

    def _sizes(self, kind: str, asked: Speculation) -> tuple[int, int, int]:
        """size_n, size_m and min_hits: the request's, the type's own, or those of all n-gram types."""
        own = structs.asdict(self._config)
        return (
            asked.size_n or own[f"{kind}_size_n"] or self._config.size_n,
            asked.n_max or own[f"{kind}_size_m"] or self._config.size_m,
            asked.min_hits or own[f"{kind}_min_hits"] or self._config.min_hits,
        )

    def _draft_sequence(self, request: Request, asked: Speculation, sampler: Sampler | None) -> DraftSequence | None:
        if self.model is None:
            return None
        draft = self._draft
        n_min = draft.n_min if asked.n_min is None else asked.n_min
        p_min = draft.p_min if asked.p_min is None else asked.p_min
        bounds = Bounds(min(asked.n_max or draft.n_max, max(draft.n_max, PLACES)), n_min, p_min)
        if sampler is None or draft.noise == "greedy":
            return DraftSequence(self.model, request.salt, bounds)
        own, start = sampler if draft.noise == "shared" else sampler.apart(), len(request.prompt)
        return DraftSequence(
            self.model, request.salt, bounds, lambda row, history, gone: own.pick(row, history, start, gone)
        )
