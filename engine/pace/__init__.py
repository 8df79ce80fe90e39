"""What a step costs, measured from the steps themselves."""

from engine.pace.acceptance import Acceptance
from engine.pace.cost import Pace, StepCost
from engine.pace.warmup import warm_up

__all__ = ["Acceptance", "Pace", "StepCost", "warm_up"]
