"""Losses of weakly supervised segmentation: tensors in, one scalar out.

`build("ptc")` gives a module by the short name of its paper; importing this package needs torch only.
"""

from wsss.losses.cam import EquivarianceLoss, EquivariantCrossLoss, MinPoolingLoss, MultiscaleAttentiveLoss
from wsss.losses.classification import ClassificationLoss
from wsss.losses.contrast import ClassTokenContrastLoss, ClassTokenSeparationLoss, PatchTokenContrastLoss
from wsss.losses.energy import DenseEnergyLoss
from wsss.losses.prototype import PixelPrototypeContrastLoss, PrototypeMemory, RegionalContrastLoss
from wsss.losses.registry import LOSSES, build, register
from wsss.losses.segmentation import BalancedCrossEntropyLoss

__all__ = [
    "LOSSES",
    "BalancedCrossEntropyLoss",
    "ClassTokenContrastLoss",
    "ClassTokenSeparationLoss",
    "ClassificationLoss",
    "DenseEnergyLoss",
    "EquivarianceLoss",
    "EquivariantCrossLoss",
    "MinPoolingLoss",
    "MultiscaleAttentiveLoss",
    "PatchTokenContrastLoss",
    "PixelPrototypeContrastLoss",
    "PrototypeMemory",
    "RegionalContrastLoss",
    "build",
    "register",
]
