"""Simulation: a model without weights, for load tests."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.contract import Share

# Stands for the path of a model file if only --sim is given.
SIMULATED_MODEL = "simulated"


class SimConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output, step time and draft acceptance of the simulated model; all other parts of the engine are real."""

    on: Annotated[
        bool,
        Meta(
            description="simulate the model: no weights are loaded, -m is only a name, the output is random words, and "
            "a step takes the time of --sim-cost"
        ),
    ] = False
    cost: Annotated[
        str,
        Meta(
            min_length=1,
            description="time of a simulated step: flat (20 ms and little for each row, as on a GPU), linear (20 ms "
            "for each row), free (none), or a file written by `paceline cost -o FILE.json`",
        ),
    ] = "flat"
    accept: Annotated[
        Share,
        Meta(
            description="chance that a draft token of the simulated proposer, which replaces all others, is accepted; "
            "0 keeps the usual proposers, which find little in random words"
        ),
    ] = 0.0
    seed: Annotated[
        int, Meta(ge=0, le=2**63 - 1, description="seed of the simulated output and of the variation of step times")
    ] = 0
