"""What a step costs, what drafts are likely to yield, and what of them is therefore verified.

curve        seconds by rows, with every jump
cost         what a step costs, learnt from every step; how many prompt rows fit beside the streams
calibration  the same measured at start, and kept for the next
acceptance   how likely a draft's tokens are right
lengths      which drafts make a step fastest for all who take part: a pure function
chooser      which drafts, how much of them, and what is only tried
journal      a line in the log for every hundred steps
"""

from engine.pace.acceptance import Acceptance
from engine.pace.calibration import Measured, calibrate, keep, kept, warm_up
from engine.pace.chooser import FIRST, Chooser, Load, Verified
from engine.pace.cost import Pace, StepCost, blend
from engine.pace.curve import Curve

__all__ = [
    "FIRST",
    "Acceptance",
    "Chooser",
    "Curve",
    "Load",
    "Measured",
    "Pace",
    "StepCost",
    "Verified",
    "blend",
    "calibrate",
    "keep",
    "kept",
    "warm_up",
]
