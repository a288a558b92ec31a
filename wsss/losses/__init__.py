"""Losses of weakly supervised segmentation: tensors in, one scalar out.

`build("ptc")` gives a module by the short name of its paper; importing this package needs torch only.
"""

from wsss.losses.affinity import AffinityLoss
from wsss.losses.cosa import SwapCAMLoss
from wsss.losses.cross_entropy import (
    BalancedCrossEntropyLoss,
    ClassificationLoss,
    ClippedCrossEntropyLoss,
    CrossEntropyLoss,
)
from wsss.losses.energy import DenseEnergyLoss
from wsss.losses.irn import DisplacementLoss
from wsss.losses.mctformer import ClassTokenSeparationLoss
from wsss.losses.ppc import PixelPrototypeContrastLoss
from wsss.losses.rcm_mam import MultiscaleAttentiveLoss, PrototypeMemory, RegionalContrastLoss
from wsss.losses.registry import LOSSES, build, register
from wsss.losses.seam import EquivarianceLoss, EquivariantCrossLoss, MinPoolingLoss
from wsss.losses.toco import ClassTokenContrastLoss, PatchTokenContrastLoss
from wsss.losses.weclip import BranchAgreementLoss, DiceLoss, FeatureAffinityLoss
from wsss.pairs import affinity_labels

__all__ = [
    "LOSSES",
    "AffinityLoss",
    "BalancedCrossEntropyLoss",
    "BranchAgreementLoss",
    "ClassTokenContrastLoss",
    "ClassTokenSeparationLoss",
    "ClassificationLoss",
    "ClippedCrossEntropyLoss",
    "CrossEntropyLoss",
    "DenseEnergyLoss",
    "DiceLoss",
    "DisplacementLoss",
    "EquivarianceLoss",
    "EquivariantCrossLoss",
    "FeatureAffinityLoss",
    "MinPoolingLoss",
    "MultiscaleAttentiveLoss",
    "PatchTokenContrastLoss",
    "PixelPrototypeContrastLoss",
    "PrototypeMemory",
    "RegionalContrastLoss",
    "SwapCAMLoss",
    "affinity_labels",
    "build",
    "register",
]
