"""What a step costs, measured from the steps themselves."""

from engine.pace.acceptance import Acceptance
from engine.pace.cost import StepCost
from engine.pace.warmup import warm_up

__all__ = ["Acceptance", "StepCost", "warm_up"]
