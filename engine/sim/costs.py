"""Time of a simulated step: named costs, and costs measured by `paceline cost`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.contract import ModelError
from engine.pace import Calibration, Curve, StepShape

PassCost = Callable[[int], float]
"""Seconds of a pass by its rows."""


def free(rows: int) -> float:
    """Returns 0."""
    return 0.0


def flat(rows: int) -> float:
    """Returns the seconds of a pass on a simulated GPU, where rows are nearly free."""
    return 0.020 + 0.00005 * rows


def linear(rows: int) -> float:
    """Returns the seconds of a pass in which a row costs the same in a batch as alone."""
    return 0.020 * rows


class SimCost(NamedTuple):
    """Cost of a step by its passes and by its pairs of a row and an attended cell."""

    pass_seconds: PassCost
    row_cell: float = 0.0
    """Seconds of a pair of a row and an attended cell."""
    flash: bool = True
    """True if attention skips the cells of a pass that a row does not attend to."""

    def seconds(self, shape: StepShape) -> float:
        """Returns the seconds of a step."""
        return sum(map(self.pass_seconds, shape.passes)) + self.row_cell * shape.attended


SIM_COSTS = {"free": SimCost(free), "flat": SimCost(flat), "linear": SimCost(linear)}


def read_cost(name: str) -> SimCost:
    """Returns the cost `name` of SIM_COSTS, or the cost in the file `name`, written by `paceline cost -o FILE.json`.

    Raises ModelError.
    """
    if name in SIM_COSTS:
        return SIM_COSTS[name]
    try:
        calibration = msgspec.json.decode(Path(name).read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(
            f"--sim-cost is one of {', '.join(SIM_COSTS)} or a file written by paceline cost, not {name!r}: {error}"
        ) from None
    return SimCost(Curve(calibration.rows).seconds, calibration.row_cell, calibration.flash)
