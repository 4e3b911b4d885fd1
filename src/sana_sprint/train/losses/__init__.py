"""The losses of a distillation, one file each.

`LOSSES` is the registry: the name of a loss's section in a stage file -> the loss, in the order in which a step computes them.
Losses on the student's own pictures come first: of their computations only the student's pass is kept, which saves memory.
"""

from sana_sprint.train.losses.adversarial import Adversarial
from sana_sprint.train.losses.base import Loss
from sana_sprint.train.losses.distribution_matching import DistributionMatching
from sana_sprint.train.losses.f_divergence import FDivergenceMatching
from sana_sprint.train.losses.scm import SCM
from sana_sprint.train.losses.trajectories import TrajectoryRegression
from sana_sprint.train.losses.twinflow import TwinFlow

LOSSES: dict[str, type[Loss]] = {
    "discriminator": Adversarial,
    "matching": DistributionMatching,
    "f_divergence": FDivergenceMatching,
    "scm": SCM,
    "twinflow": TwinFlow,
    "trajectories": TrajectoryRegression,
}

__all__ = [
    "LOSSES",
    "SCM",
    "Adversarial",
    "DistributionMatching",
    "FDivergenceMatching",
    "Loss",
    "TrajectoryRegression",
    "TwinFlow",
]
