"""A model that computes nothing, in place of one."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.config.flags import flags
from engine.contract import Share

SIM = "simulated"
"""What stands for the path of a model that computes nothing."""


class SimConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Load tests without weights: everything is real but the model."""

    on: Annotated[
        bool,
        Meta(
            description="no model is loaded, -m only names it: words at random, at the pace of --sim-cost",
            extra=flags("--sim"),
        ),
    ] = False
    cost: Annotated[
        str,
        Meta(
            min_length=1,
            description="what a step takes: flat (20 ms and little for each row, as on a GPU), linear (20 ms a row), "
            "free (nothing), or a file that `paceline cost -o FILE.json` wrote",
            extra=flags("--sim-cost"),
        ),
    ] = "flat"
    accept: Annotated[
        Share,
        Meta(
            description="chance that a guessed token is right, by one who knows the words and guesses instead of all "
            "others; 0 leaves it to them, who find nothing",
            extra=flags("--sim-accept"),
        ),
    ] = 0.0
    seed: Annotated[
        int, Meta(ge=0, le=2**63 - 1, description="of its words and of how its times vary", extra=flags("--sim-seed"))
    ] = 0
