"""The op ``mutual``, as the formulas say it: M students that teach each other.

With p_i = softmax(z_i/τ) and D_ij = KL(p_j‖p_i), what student i has to learn from peer j:

    row_loss = r · scale · Σ_{i≠j} a_ij D_ij          scale = τ², or 1
    loss     = Σ_rows row_loss / n                    n rows count: r not 0

A row that does not count, and a pair of weight 0, are replaced by harmless numbers before any arithmetic. ``a`` is
[M, M]; its diagonal is not used.
"""

import torch
from torch import Tensor

from mtkd_fast.reference.divergences import forward_kl
from mtkd_fast.reference.kd import compute_dtype, reduce_rows


def mutual(
    students: list[Tensor],
    pair_weights: Tensor | None,
    row_weights: Tensor | None,
    num_items: Tensor | None,
    *,
    temperature: float,
    scale: float,
    detach_peers: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """M students [..., C] -> (loss, divergences [M, M, ...], detached, 0 where they do not count)."""
    rows, n_classes, m = students[0].shape[:-1], students[0].shape[-1], len(students)
    dtype = compute_dtype(*students)
    z = [s.reshape(-1, n_classes).to(dtype) for s in students]
    r = torch.ones_like(z[0][:, 0]) if row_weights is None else row_weights.reshape(-1).to(dtype)
    counts = r != 0
    a = (
        torch.full((m, m), 1 / (m - 1), dtype=dtype, device=r.device)
        if pair_weights is None
        else pair_weights.to(dtype)
    )
    paired = (a != 0) & ~torch.eye(m, dtype=torch.bool, device=r.device)

    log_p = []
    for i, z_i in enumerate(z):
        read = counts & (paired[i] | paired[:, i]).any()
        log_p.append((torch.where(read[:, None], z_i, 0.0) / temperature).log_softmax(-1))
    row_loss, divergences = torch.zeros_like(r), []
    for i, learner in enumerate(log_p):
        for j, peer in enumerate(log_p):
            used = counts & paired[i, j]
            target = torch.where(used[:, None], peer.detach() if detach_peers else peer, 0.0)
            d = forward_kl(target, torch.where(used[:, None], learner, 0.0))  # of zeros from zeros: 0
            row_loss = row_loss + torch.where(used, a[i, j] * d, 0.0)
            divergences.append(torch.where(used, d.detach(), 0.0))
    row_loss = torch.where(counts, r * scale * row_loss, 0.0)
    loss = reduce_rows(row_loss, counts, num_items, reduction).reshape(rows if reduction == "none" else ())
    return loss, torch.stack(divergences).reshape(m, m, *rows)
