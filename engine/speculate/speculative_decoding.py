"""Speculative decoding of one engine: the proposers of each sequence, their shared data and their statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from msgspec import structs

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, DraftStats, ProposerType, Request, Speculation
from engine.grammar import Matcher
from engine.media import without_runs
from engine.pace import DraftChooser, StepCost
from engine.sampling import Sampler
from engine.speculate.draft_model import DraftModel, DraftSequence
from engine.speculate.grammar import GrammarProposer
from engine.speculate.mtp import MtpProposer, MtpSequence
from engine.speculate.ngram_map import NgramMapK4vProposer, NgramMapKProposer
from engine.speculate.ngram_simple import NgramSimpleProposer
from engine.speculate.planner import DraftPlanner
from engine.speculate.prediction import PredictionProposer
from engine.speculate.proposer import DraftBounds, Proposer
from engine.speculate.proposer_stats import ProposerStats, acceptance_line
from engine.speculate.sampled_draft import PickToken
from engine.speculate.sequence_proposers import SequenceProposers
from engine.speculate.shared_data import SharedDraftData
from engine.speculate.suffix import SuffixProposer

log = logging.getLogger("paceline.speculation")

# Returns the proposers of a request, by type.
ProposerFactory = Callable[[Request], Mapping[str, Proposer]]


class SpeculativeDecoding:
    """Makes the proposers of each sequence, and plans their drafts by `planner`. Belongs to the engine thread."""

    def __init__(
        self,
        shared: SharedDraftData,
        config: SpeculationConfig,
        draft_config: DraftConfig,
        draft_model: DraftModel | None = None,
        factory: ProposerFactory | None = None,
        cost: StepCost | None = None,
        mtp: MtpProposer | None = None,
    ) -> None:
        """`factory` replaces all types of proposers. `cost` is the cost model of the target model's steps; without it,
        drafts are verified in a fixed order only. There is a draft model or `mtp`, not both."""
        assert draft_model is None or mtp is None, "one batched proposer drafts for all sequences"
        self.draft_model = draft_model
        self._mtp = mtp
        self.chooser = DraftChooser(cost or StepCost())
        self.planner = DraftPlanner(self.chooser, draft_model or mtp)
        self._shared = shared
        self._config = config
        self._draft_config = draft_config
        self._factory = factory
        self.with_second_choices = False
        """True if later drafts of the draft model have second choices. Set by `EngineCore`."""
        self._default = Speculation(type=config.default_types)
        self._stats: dict[str, ProposerStats] = {}

    @property
    def draft_stats(self) -> tuple[DraftStats, ...]:
        """Statistics of the drafts of all requests, by type. Any thread may call."""
        return tuple(stats.draft_stats for stats in list(self._stats.values()))

    @property
    def faults(self) -> dict[str, str]:
        """Reason for each type of batched proposer that has failed and drafts no more. Any thread may call."""
        batched = {DraftSequence.type: self.draft_model, MtpSequence.type: self._mtp}
        return {type: each.fault for type, each in batched.items() if each is not None and each.fault}

    def log_stats(self, proposers: SequenceProposers) -> None:
        """Logs the acceptance of a request's drafts, and the statistics since the start of the engine of each type that
        made one of these drafts. Logs nothing for a request without verified drafts."""
        if not log.isEnabledFor(logging.INFO):
            return
        drafting = [stats for stats in proposers.draft_stats if stats.drafted]
        if drafting:
            log.info("%s", acceptance_line(drafting))
        for stats in drafting:
            log.info("%s", self._stats[stats.type])

    def close(self) -> None:
        """Saves the shared data to the files that are named in the configuration."""
        self._shared.save()

    # ── the proposers of a request ──

    def sequence_proposers(
        self, request: Request, sampler: Sampler | None = None, matcher: Matcher | None = None
    ) -> SequenceProposers:
        """Returns the proposers of a new sequence.

        The batched proposer picks tokens with `sampler`, or the most likely tokens without one. Drafts end before the
        first token that the grammar of `matcher` forbids.
        """
        speculation = self._speculation(request)
        if self._factory is not None:
            proposers, batched = dict(self._factory(request)), None
        else:
            proposers, batched = self.proposers(request, matcher), self._batched_sequence(request, sampler)
        for type in [*proposers, *([batched.type] if batched is not None else [])]:
            self._stats.setdefault(type, ProposerStats(type))
        num_permitted = matcher.validate_tokens if matcher is not None else None
        bounds = DraftBounds(speculation.n_max, speculation.n_min or 0, speculation.p_min or 0.0, num_permitted)
        fixed = (speculation.order or self._config.order) == "fixed"
        return SequenceProposers(proposers, batched, totals=self._stats, bounds=bounds, fixed=fixed)

    def proposers(self, request: Request, matcher: Matcher | None = None) -> dict[str, Proposer]:
        """Returns the proposers of a request by type, except that of the batched proposer."""
        speculation = self._speculation(request)
        proposers = {type: self._make(type, request, speculation, matcher) for type in _types(speculation)}
        return {type: proposer for type, proposer in proposers.items() if proposer is not None}

    def _speculation(self, request: Request) -> Speculation:
        """Returns the request's settings or else the default, with the type `prediction` added if the request has
        one."""
        speculation = self._default if request.speculation is None else request.speculation
        if request.prediction and (speculation.type or request.speculation is None):
            return structs.replace(speculation, type=(*speculation.type, "prediction"))
        return speculation

    def _make(
        self, type: ProposerType, request: Request, speculation: Speculation, matcher: Matcher | None
    ) -> Proposer | None:
        config, shared = self._config, self._shared
        prompt_length = len(without_runs(request.prompt, request.media))
        match type:
            case "prediction":
                return PredictionProposer(request.prediction, prompt_length) if request.prediction else None
            case "grammar":
                return GrammarProposer(matcher) if matcher is not None else None
            case "ngram-simple":
                return NgramSimpleProposer(*self._sizes("simple", speculation))
            case "ngram-map-k":
                return NgramMapKProposer(*self._sizes("map_k", speculation))
            case "ngram-map-k4v":
                return NgramMapK4vProposer(*self._sizes("map_k4v", speculation))
            case "ngram-mod":
                n_min = config.mod_min if speculation.n_min is None else speculation.n_min
                return shared.mod(request.namespace, n_min, max(config.mod_max, speculation.n_max or 0))
            case "ngram-cache":
                return shared.cache(request.salt, speculation.n_max or config.cache_max)
            case "suffix":
                return SuffixProposer(
                    shared.outputs,
                    request.namespace,
                    prompt_length,
                    depth=config.suffix_depth,
                    factor=config.suffix_factor,
                    p_min=config.suffix_p_min if speculation.p_min is None else speculation.p_min,
                )
            case "draft" | "draft-mtp":
                return None  # made by `_batched_sequence`

    def _sizes(self, option: str, speculation: Speculation) -> tuple[int, int, int]:
        """Returns size_n, size_m and min_hits. The request's values have priority over those configured for the type,
        and these over those configured for all n-gram types."""
        config = structs.asdict(self._config)
        return (
            speculation.size_n or config[f"{option}_size_n"] or self._config.size_n,
            speculation.n_max or config[f"{option}_size_m"] or self._config.size_m,
            speculation.min_hits or config[f"{option}_min_hits"] or self._config.min_hits,
        )

    def _batched_sequence(self, request: Request, sampler: Sampler | None) -> DraftSequence | MtpSequence | None:
        """Returns the request's sequence in the draft model or the MTP layers; None if there is neither, or if the
        request does not have the type."""
        speculation, config = self._speculation(request), self._draft_config
        types = _types(speculation)
        n_max = config.max_tokens(speculation.n_max)
        n_min = config.n_min if speculation.n_min is None else speculation.n_min
        p_min = config.p_min if speculation.p_min is None else speculation.p_min
        bounds = DraftBounds(n_max, n_min, p_min)
        if self.draft_model is not None and DraftSequence.type in types:
            pick = self._pick_token(request, sampler)
            return DraftSequence(
                self.draft_model,
                request.salt,
                bounds,
                pick,
                keep=request.cache,
                with_second_choices=self.with_second_choices,
            )
        if self._mtp is not None and MtpSequence.type in types:
            bounds = DraftBounds(min(n_max, self._mtp.max_draft or n_max), n_min, p_min)
            media_tokens = sum(run.chunk.length for run in request.media)
            return MtpSequence(bounds, self._pick_token(request, sampler), media_tokens)
        return None

    def _pick_token(self, request: Request, sampler: Sampler | None) -> PickToken | None:
        """Returns the function that picks draft tokens with the noise of `--draft-noise`; None for greedy
        drafts."""
        if sampler is None or self._draft_config.noise == "greedy":
            return None
        draft_sampler = sampler.for_drafts(independent=self._draft_config.noise == "off")
        prompt_length = len(without_runs(request.prompt, request.media))
        return lambda row, history, discarded: draft_sampler.pick(row, history, prompt_length, discarded)


def _types(speculation: Speculation) -> tuple[ProposerType, ...]:
    """Returns the types of proposers of a request, in the order of `PROPOSER_TYPES`."""
    if "auto" in speculation.type:
        return PROPOSER_TYPES
    return tuple(type for type in PROPOSER_TYPES if type in speculation.type)
