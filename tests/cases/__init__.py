"""The case table, one file an op: what every implementation is compared on, and why each case is there."""

import torch

INF, NAN = float("inf"), float("nan")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
