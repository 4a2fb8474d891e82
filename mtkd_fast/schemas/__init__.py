"""The ops of torch.ops.mtkd_fast: their schemas and what they return, without a kernel. One file an op.

Declared here and nowhere else, so that a build without C++ has the same ops, and torch.compile sees one graph either
way. C++ adds the implementations (csrc/*_ops.cpp, *_autograd.cpp), Triton those of ``*_triton*`` (triton_ops/).

    kd, kd_divergence, mixture, mixture_divergence,
    mutual, hint, relation                             with autograd; what the public functions call
    *_forward, *_backward, ...                         the passes over memory, without autograd
"""

from mtkd_fast.schemas import attention, hint, kd, mixture, mutual, relation  # noqa: F401  (each declares its ops)
