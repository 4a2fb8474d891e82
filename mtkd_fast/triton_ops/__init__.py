"""The Triton kernels as ops of torch.ops.mtkd_fast, and their autograd. One file an op; imported when first used."""
