"""Meta Pseudo Labels itself: losses, feedback, the step, and the baselines on the same terms."""

from mpl_scale.mpl import baselines, kekmodel, matching, step
from mpl_scale.mpl.feedback import FEEDBACK_RULES, register_feedback
from mpl_scale.mpl.methods import METHODS, Method, register_method
from mpl_scale.mpl.network import GradientShard, Network
from mpl_scale.mpl.noted import PseudoLabels
from mpl_scale.mpl.state import Baseline, MovingAverage, Schedules, State
from mpl_scale.mpl.training_losses import LOSSES, register_loss

__all__ = [
    "FEEDBACK_RULES",
    "LOSSES",
    "METHODS",
    "Baseline",
    "GradientShard",
    "Method",
    "MovingAverage",
    "Network",
    "PseudoLabels",
    "Schedules",
    "State",
    "baselines",
    "kekmodel",
    "matching",
    "register_feedback",
    "register_loss",
    "register_method",
    "step",
]
