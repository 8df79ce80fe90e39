"""Settings of the simulated model, which has no weights, for load tests."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.contract import Share

# Path of the model if --sim is given without -m.
SIMULATED_MODEL = "simulated"


class SimConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output, step time and draft acceptance of the simulated model. All other parts of the engine are not
    simulated."""

    on: Annotated[
        bool,
        Meta(
            description="simulate the model: no weights are loaded, -m is only a name, the output is random words, and "
            "a step takes the time that --sim-cost gives",
        ),
    ] = False
    cost: Annotated[
        str,
        Meta(
            min_length=1,
            description="time of a simulated step: flat (20 ms, and little more for each row, as on a GPU), linear "
            "(20 ms for each row), free (0 ms), or a file that `paceline cost -o FILE.json` wrote",
        ),
    ] = "flat"
    accept: Annotated[
        Share,
        Meta(
            description="probability that a draft token is accepted, by a simulated proposer that replaces all others; "
            "0 keeps the usual proposers, which find few drafts in random words",
        ),
    ] = 0.0
    vocabulary: Annotated[
        int,
        Meta(
            ge=0,
            le=2**20,
            description="tokens of the simulated vocabulary, most of which are never picked, so that rows of logits "
            "have the size of those of a real model; 0 is the smallest, about 1,000",
        ),
    ] = 0
    seed: Annotated[
        int, Meta(ge=0, le=2**63 - 1, description="seed of the simulated output and of the variation of step times")
    ] = 0
