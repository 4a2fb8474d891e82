"""Published methods, one file each, as modules with the paper's defaults."""

from mtkd_fast.losses.adapter import HintAdapter
from mtkd_fast.losses.adaptive import AdaptiveDistillationLoss
from mtkd_fast.losses.aekd import AEKDLoss
from mtkd_fast.losses.amtml import AMTMLKDLoss, GroupHints, InstanceWeights
from mtkd_fast.losses.average import AverageKDLoss
from mtkd_fast.losses.ca_mkd import CAMKDLoss
from mtkd_fast.losses.ctsl_mkt import CTSLMKTLoss
from mtkd_fast.losses.dgkd import DGKDLoss, GuideSampler, dense_chain
from mtkd_fast.losses.entropy import EntropyKDLoss
from mtkd_fast.losses.fitnet import FitNetKDLoss

__all__ = [
    "AEKDLoss",
    "AMTMLKDLoss",
    "AdaptiveDistillationLoss",
    "AverageKDLoss",
    "CAMKDLoss",
    "CTSLMKTLoss",
    "DGKDLoss",
    "EntropyKDLoss",
    "FitNetKDLoss",
    "GroupHints",
    "GuideSampler",
    "HintAdapter",
    "InstanceWeights",
    "dense_chain",
]
