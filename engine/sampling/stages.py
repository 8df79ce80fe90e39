"""Runs the sampling stages of a request in their order, from a row of logits to the candidates of the pick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from engine.sampling.candidates import (
    UNLIMITED_REACH,
    Candidates,
    Row,
    candidates_within,
    nucleus_candidates,
    top_candidates,
)
from engine.sampling.noise import NOISE_SPAN
from engine.sampling.temperature import effective_temperature, scaled
from engine.sampling.truncate import min_p, top_k, top_n_sigma, top_p, typical_p, xtc
from engine.sampling_params import DEFAULT_SAMPLERS, SamplerStage, SamplingParams

# Stages that change logits of a row by the history.
WEIGHING_STAGES = frozenset[SamplerStage](("penalties", "dry"))
# Stages whose result depends on unlikely candidates too, unless another stage dropped these before.
_SENSITIVE_STAGES = WEIGHING_STAGES | {"top_n_sigma", "infill"}

# Runs a stage that needs the history or the texts of tokens.
OtherStage = Callable[[SamplerStage, Candidates], Candidates]


def has_penalties(params: SamplingParams) -> bool:
    """Returns True if the repeat, presence or frequency penalty has an effect."""
    neutral = params.repeat_penalty == 1.0 and not params.presence_penalty and not params.frequency_penalty
    return params.repeat_last_n != 0 and not neutral


def has_adaptive_p(params: SamplingParams) -> bool:
    """Returns True if adaptive-p is the last stage."""
    named = "adaptive_p" in params.samplers or params.samplers == DEFAULT_SAMPLERS
    return params.adaptive_target >= 0.0 and named and not params.mirostat


def active_stages(params: SamplingParams) -> tuple[SamplerStage, ...]:
    """Returns the stages that have an effect, in order, without `adaptive_p`. Empty with Mirostat."""
    if params.mirostat:
        return ()
    active: dict[SamplerStage, bool] = {
        "penalties": has_penalties(params),
        "dry": params.dry_multiplier > 0.0 and params.dry_penalty_last_n != 0,
        "top_n_sigma": params.top_n_sigma > 0.0,
        "top_k": params.top_k > 0,
        "typ_p": params.typical_p < 1.0,
        "top_p": params.top_p < 1.0,
        "min_p": params.min_p > 0.0,
        "xtc": params.xtc_probability > 0.0 and params.xtc_threshold <= 0.5,
        "temperature": params.temperature != 1.0 or params.dynatemp_range > 0.0,
        "infill": True,
        "adaptive_p": False,
    }
    return tuple(stage for stage in params.samplers if active[stage])


def run_stages(row: Row, params: SamplingParams, stages: Sequence[SamplerStage], other: OtherStage) -> Candidates:
    """Returns the candidates of a row after `stages`, which are active. Raises BadLogits.

    `other` computes the stages `penalties`, `dry` and `infill`. Unless a stage depends on them, tokens that are too
    unlikely to be picked are no candidates from the start.
    """
    found, stages = _first_candidates(row, params, stages)
    for stage in stages:
        found = _run_stage(stage, found, params, other)
    return found


def only_min_p(params: SamplingParams, stages: Sequence[SamplerStage]) -> float:
    """Returns log(min_p) if min_p drops all tokens whose logit is below the maximum plus this value, and no earlier
    stage can drop the most likely token; otherwise -inf."""
    if "min_p" not in stages or params.min_keep > 1:
        return -math.inf
    earlier = set(stages[: stages.index("min_p")])
    return math.log(params.min_p) if earlier <= {"top_n_sigma", "top_k", "top_p"} else -math.inf


def _first_candidates(
    row: Row, params: SamplingParams, stages: Sequence[SamplerStage]
) -> tuple[Candidates, Sequence[SamplerStage]]:
    """Returns candidates that contain those of all `stages`, selected in the row, and the stages that are left."""
    reach, is_cut = reach_of(params, stages), stages[:1] == ("top_n_sigma",)
    lowest = -math.inf
    if is_cut:
        lowest = top_n_sigma(row, params.top_n_sigma)
        reach, stages = reach_of(params, stages[1:]), stages[1:]
        reach = min(reach, max(0.0, float(row.max()) - lowest))
    if stages[:1] == ("min_p",) or stages[:2] == ("top_p", "min_p"):
        reach = min(reach, -math.log(params.min_p) if params.min_keep <= 1 else math.inf)
    if stages[:1] == ("top_k",):
        found, stages = top_candidates(row, params.top_k, reach), stages[1:]
    elif stages[:1] == ("top_p",) and params.min_keep <= 1 and not is_cut:
        found = nucleus_candidates(row, params.top_p, reach)
    else:
        found = candidates_within(row, reach)
    return (found.select(found.logits >= lowest) if is_cut else found), stages


def reach_of(params: SamplingParams, stages: Sequence[SamplerStage]) -> float:
    """Returns the largest distance of a logit from the maximum at which its token affects the pick.

    All tokens more than `NOISE_SPAN` below the maximum together hold less than 1e-12 of the mass at temperature 1.
    Tokens more than `NOISE_SPAN` * T below the maximum are never picked at temperature T.
    """
    is_dynamic = params.dynatemp_range > 0.0 and "temperature" in stages
    if is_dynamic or params.min_keep > 1 or has_adaptive_p(params) or not _SENSITIVE_STAGES.isdisjoint(stages):
        return UNLIMITED_REACH
    temperature = params.temperature ** stages.count("temperature")
    return NOISE_SPAN * (temperature if set(stages) <= {"temperature"} else max(temperature, 1.0))


def _run_stage(stage: SamplerStage, found: Candidates, params: SamplingParams, other: OtherStage) -> Candidates:
    logits, keep = found.logits, params.min_keep
    match stage:
        case "top_n_sigma":
            return found.select(logits >= top_n_sigma(logits, params.top_n_sigma))
        case "top_k":
            return found.select(top_k(logits, params.top_k))
        case "typ_p":
            return found.select(typical_p(logits, params.typical_p, keep))
        case "top_p":
            ranked = found if (logits[1:] <= logits[:-1]).all() else found.select(top_k(logits, len(logits)))
            return ranked.select(top_p(ranked.logits, params.top_p, found.mass, keep))
        case "min_p":
            return found.select(min_p(logits, params.min_p, keep))
        case "xtc":
            return found.select(xtc(logits, params.xtc_threshold, keep))
        case "temperature":
            return found._replace(logits=scaled(logits, effective_temperature(logits, params)), mass=None)
    return other(stage, found)
