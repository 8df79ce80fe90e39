"""Cost of a step, acceptance of drafts, and the number of draft tokens that a step verifies.

curve        seconds of a pass by its rows, with every jump
recurrent_passes  passes of models with recurrent states, and the rollbacks that they make impossible: pure functions
passes       passes and attended cells of a step, by KV layout: pure functions
cost         cost of a step, learned from each step; number of prompt rows that fit into a step
calibration  measurement of the cost at start, saved for the next start
acceptance   chance that the tokens of a draft are accepted, learned from each draft
alternatives  second tokens at one place of a draft: pure functions
lengths      lengths of drafts that are best for all sequences together: pure functions
chooser      choice among several drafts and their lengths, with trials to explore
step_log     a line in the log for every hundred steps
"""

from engine.pace.acceptance import AcceptanceEstimate
from engine.pace.alternatives import AlternativeOption, SecondChance, best_place
from engine.pace.calibration import Calibration, calibrate, load_calibration, save_calibration, warm_up
from engine.pace.chooser import TRIAL_TOKENS, DraftChooser, UpcomingStep, VerifiedDraft
from engine.pace.cost import PrefillWait, StepCost, StepTargets, blend
from engine.pace.curve import Curve
from engine.pace.passes import Layout, Pass, SequenceRows, StepShape

__all__ = [
    "TRIAL_TOKENS",
    "AcceptanceEstimate",
    "AlternativeOption",
    "Calibration",
    "Curve",
    "DraftChooser",
    "Layout",
    "Pass",
    "PrefillWait",
    "SecondChance",
    "SequenceRows",
    "StepCost",
    "StepShape",
    "StepTargets",
    "UpcomingStep",
    "VerifiedDraft",
    "best_place",
    "blend",
    "calibrate",
    "load_calibration",
    "save_calibration",
    "warm_up",
]
