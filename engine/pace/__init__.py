"""Cost of a step, acceptance of drafts, and the number of draft tokens that a step verifies.

curve        seconds of a pass by its rows, with every jump
passes       passes and attended cells of a step, by KV layout: pure functions
cost         cost of a step, learned from every step; number of prompt rows that fit
calibration  the same measured at start, and kept for the next start
acceptance   chance that the tokens of a draft are accepted
lengths      lengths of drafts that make a step best for all sequences: pure functions
chooser      choice among several drafts, their lengths, and exploration
journal      a line in the log for every hundred steps
"""

from engine.pace.acceptance import Acceptance
from engine.pace.calibration import Measured, calibrate, keep, kept, warm_up
from engine.pace.chooser import FIRST, Chooser, Load, Verified
from engine.pace.cost import Pace, StepCost, blend
from engine.pace.curve import Curve
from engine.pace.passes import Layout, Pass, SequenceRows, Shape

__all__ = [
    "FIRST",
    "Acceptance",
    "Chooser",
    "Curve",
    "Layout",
    "Load",
    "Measured",
    "Pace",
    "Pass",
    "SequenceRows",
    "Shape",
    "StepCost",
    "Verified",
    "blend",
    "calibrate",
    "keep",
    "kept",
    "warm_up",
]
