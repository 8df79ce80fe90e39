"""Costs of simulated steps: named costs, and costs that `paceline cost` measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.contract import ModelError
from engine.pace import Calibration, Curve, StepShape

# Returns the seconds of a pass for its number of rows.
PassCost = Callable[[int], float]


def free(rows: int) -> float:
    """Returns 0 seconds for any pass."""
    return 0.0


def flat(rows: int) -> float:
    """Returns the seconds of a pass as on a GPU: 20 ms, and little more for each row."""
    return 0.020 + 0.00005 * rows


def linear(rows: int) -> float:
    """Returns the seconds of a pass that takes 20 ms for each row."""
    return 0.020 * rows


class SimCost(NamedTuple):
    """Cost of a step: the sum over its passes, and an amount for each pair of a row and a cell that the row attends
    to."""

    pass_seconds: PassCost
    row_cell: float = 0.0
    """Seconds for each pair of a row and an attended cell."""
    flash: bool = True
    """True for flash attention, which skips the cells that a row does not attend to."""

    def seconds(self, shape: StepShape) -> float:
        """Returns the seconds of a step."""
        return sum(map(self.pass_seconds, shape.passes)) + self.row_cell * shape.attended


SIM_COSTS = {"free": SimCost(free), "flat": SimCost(flat), "linear": SimCost(linear)}


def read_cost(name: str) -> SimCost:
    """Returns the cost `name` in `SIM_COSTS`, or the cost in the file `name`, which `paceline cost -o FILE.json` wrote.

    Raises ModelError if there is no such cost and the file cannot be read.
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
