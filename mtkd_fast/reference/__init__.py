"""The law: every op written from its formula in plain PyTorch, sharing nothing with the kernels."""
