"""Published methods, one file each, as modules with the paper's defaults."""

from mtkd_fast.losses.adapter import HintAdapter
from mtkd_fast.losses.ca_mkd import CAMKDLoss

__all__ = ["CAMKDLoss", "HintAdapter"]
