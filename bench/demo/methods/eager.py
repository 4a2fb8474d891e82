"""The methods in eager PyTorch, as their published code writes them: the loop over teachers, one loss each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .learners import Batch, Learner
from .networks import Outputs

TAU = 4.0


def divergence(student: Tensor, teacher: Tensor, tau: float = TAU) -> Tensor:
    """τ² KL(p‖q) [B]"""
    log_q, p = F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1)
    return tau**2 * F.kl_div(log_q, p, reduction="none").sum(1)


def divergences(batch: Batch, student: Outputs) -> Tensor:
    """[K, B]"""
    return torch.stack([divergence(student.logits, t.logits) for t in batch.teachers])


def hard_labels(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    return F.cross_entropy(student.logits, batch.labels)


def average(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    return hard_labels(learner, batch, student) + divergences(batch, student).mean(0).mean()


def confidence(logits: list[Tensor], labels: Tensor) -> Tensor:
    """[K, B]"""
    ce = torch.stack([F.cross_entropy(t, labels, reduction="none") for t in logits])
    return (1 - F.softmax(ce, 0)) / (len(logits) - 1)


def entropy(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    entropies = []
    for t in batch.teachers:
        log_p = F.log_softmax(t.logits, 1)
        entropies.append(-(log_p.exp() * log_p).sum(1))
    h = torch.stack(entropies)
    weights = (1 - h / h.sum(0)) / (len(h) - 1)
    return hard_labels(learner, batch, student) + (weights * divergences(batch, student)).sum(0).mean()


def adaptive_ensemble(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    """A backward pass a teacher, here to the logits only, and a quadratic program on the host."""
    from sklearn.svm import OneClassSVM

    logits = student.logits.detach().requires_grad_()
    losses = [divergence(logits, t.logits).mean() for t in batch.teachers]
    v = torch.stack([torch.autograd.grad(loss, logits)[0].mean(0) for loss in losses])
    gram = (v @ v.T).cpu().double().numpy()
    most, n = 0.6, len(losses)
    solver = OneClassSVM(kernel="precomputed", nu=1 / (most * n), tol=1e-10).fit(gram / gram.max())
    weights = torch.zeros(n)
    weights[solver.support_] = torch.tensor(solver.dual_coef_[0] * most, dtype=torch.float32)
    weights = weights.to(student.logits.device)
    return hard_labels(learner, batch, student) + weights @ divergences(batch, student).mean(1)


def fitnet(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    loss = average(learner, batch, student)
    for adapt, teacher in zip(learner.adapters, batch.teachers, strict=True):
        loss = loss + 100 * F.mse_loss(adapt(student.maps[0], teacher.maps[0]), teacher.maps[0]) / len(batch.teachers)
    return loss


def ca_mkd(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    weights = confidence([t.logits for t in batch.teachers], batch.labels)
    loss = hard_labels(learner, batch, student) + (weights * divergences(batch, student)).sum(0).mean()
    adapted, heads = [], []
    for adapt, head, teacher in zip(learner.adapters, learner.heads, batch.teachers, strict=True):
        adapted.append(adapt(student.maps[1], teacher.maps[1]))
        heads.append(head(adapted[-1]))
    weights = confidence([u.detach() for u in heads], batch.labels)
    distances = [
        F.mse_loss(f, t.maps[1], reduction="none").mean((1, 2, 3)) for f, t in zip(adapted, batch.teachers, strict=True)
    ]
    return loss + 50 * (weights * torch.stack(distances)).sum(0).mean()


def dgkd(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    share = 0.7
    loss = len(batch.guides) * (1 - share) * hard_labels(learner, batch, student)
    for guide in batch.guides:
        loss = loss + share * divergence(student.logits, guide, tau=5.0).mean()
    return loss


def distances(x: Tensor) -> Tensor:
    """[B, B], Euclidean."""
    squares = x.square().sum(1)
    return (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x), device=x.device))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        t = distances(teacher)
        t = t / t[t > 0].mean()
    s = distances(student)
    return F.smooth_l1_loss(s / s[s > 0].mean(), t)


def cosines(x: Tensor) -> Tensor:
    """[B, B, B], at vertex i between j and k."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        t = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), t)


def amtml(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    share, tau, weights = 0.7, 5.0, learner.criterion.weights
    scores = torch.stack([(student.pooled * theta * weights.W).sum(1) for theta in weights.theta], 1)
    mu = F.softmax(scores, 1)
    p = torch.stack([F.softmax(t.logits / tau, 1) for t in batch.teachers], 1)
    mixture = (mu[:, :, None] * p).sum(1)
    loss = 2 * share * tau**2 * F.kl_div(F.log_softmax(student.logits / tau, 1), mixture, reduction="batchmean")
    loss = loss + (1 - share) * F.cross_entropy(student.logits, batch.labels)
    loss = loss + rkd_distance(student.logits, mixture.detach()) + rkd_angle(student.logits, mixture.detach())
    for adapt, teacher in zip(learner.criterion.hints.adapters, batch.teachers, strict=True):
        adapted = adapt(F.normalize(student.maps[1], dim=1))
        loss = loss + F.mse_loss(adapted, F.normalize(teacher.maps[1], dim=1))
    return loss + 0.1 * (weights.W.square().sum() + weights.theta.square().sum())


def attention(f: Tensor) -> Tensor:
    """[B, S]"""
    a = f.square().sum(1).flatten(1)
    return a / (a.norm(dim=1, keepdim=True) + 1e-6)


def gram(f: Tensor) -> Tensor:
    """[B, C, C]"""
    x = F.normalize(f.flatten(2), dim=2)
    return torch.bmm(x, x.transpose(1, 2))


def adaptive(learner: Learner, batch: Batch, student: Outputs) -> Tensor:
    teacher = batch.teachers[0]
    pairs = list(zip(student.maps, teacher.maps, strict=True))
    adapted = [adapt(f, g) for adapt, (f, g) in zip(learner.adapters, pairs, strict=True)]
    paths = torch.stack(
        [
            sum(F.mse_loss(gram(f), gram(g)) for f, (_, g) in zip(adapted, pairs, strict=True)),
            F.mse_loss(student.logits, teacher.logits),
            sum(F.mse_loss(attention(f), attention(g)) for f, g in pairs),
            divergence(student.logits, teacher.logits).mean(),
        ]
    )
    alpha = torch.cat([alpha.reshape(-1) for alpha in learner.criterion.alpha.values()])
    return F.cross_entropy(student.logits, batch.labels) + ((-alpha).exp() * paths + alpha).sum()


def ctsl_mkt(learner: Learner, batch: Batch, *students: Outputs) -> Tensor:
    loss = 0.0
    for k, student in enumerate(students):
        z, peer, tau = student.logits, students[1 - k].logits.detach(), 4.0
        loss = loss + F.cross_entropy(z, batch.labels) + divergence(z, batch.alone[k], tau).mean() / tau**2
        loss = loss + rkd_distance(z, peer) + 2 * rkd_angle(z, peer) + divergence(z, peer, 1.0).mean()
    return loss


LOSSES = {
    "hard labels": hard_labels,
    "AVER": average,
    "EBKD": entropy,
    "AE-KD": adaptive_ensemble,
    "FitNet-MKD": fitnet,
    "CA-MKD": ca_mkd,
    "AMTML-KD": amtml,
    "DGKD": dgkd,
    "Adaptive Distillation": adaptive,
    "CTSL-MKT": ctsl_mkt,
}
