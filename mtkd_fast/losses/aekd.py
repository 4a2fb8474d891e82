"""AE-KD: teachers weighed so that their gradients, taken together, do not fight each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd_fast import checks
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss
from mtkd_fast.reference.kd import compute_dtype

SOLVERS = ("exact", "legacy_init")
MOST_TEACHERS = 9  # of the exact solver, which tries 3^K faces
SLACK = 1e-9  # of a weight that a system gives, against its bounds
RIDGE = 1e-12  # of the Gram matrix's mean diagonal: among equally good weights the most even


class AEKDLoss(DistillationLoss):
    """ce_weight · CE + kd_weight · τ² · mean over rows of Σ_k a_k KL(p_k‖q), one a for the whole batch.

    a minimises ‖Σ_k a_k V_k‖² under Σ_k a_k = 1 and 0 <= a_k <= max_weight, V_k the batch mean of teacher k's gradient
    in the student's logits, which is τ(q̄ − p̄_k)/N with mean probabilities q̄, p̄_k: no backward pass is needed.

    Args:
        temperature: τ. The code: 4.
        ce_weight, kd_weight: γ, α; 1 and 1.
        max_weight: the paper's C, raised to 1/K where it is less. The code: 0.6. 1: the minimum-norm point; 1/K: the
            average.
        solver: "exact", the solution of the quadratic program; or "legacy_init", what the released code computes for a
            hundred classes or more: its solver finds every V below its absolute tolerance and returns the point it
            starts from, max_weight for the first teachers until 1 is spent ([0.6, 0.4, 0, ...]).
        normalise: scale every V_k to length 1, solve, and divide a_k by ‖V_k‖ (the code's svm_norm; off for logits). A
            weight may then exceed max_weight.
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with student_logits [N, C], teacher_logits (K tensors or [K, N, C]), target [N].

    Gradient: to the student's logits, and to teachers that require it; a is a constant. The mean probabilities cost a
    softmax of every tensor in plain PyTorch, two or three N x C tensors at a time. Under data parallelism every process
    weighs by its own part of the batch.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came; also for more than nine
        teachers with solver="exact".

    Source: Du et al., NeurIPS 2020 (code: github.com/AnTuo1998/AE-KD, and CA-MKD's copy of it).

    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> AEKDLoss()(student, torch.randn(3, 8, 10), torch.randint(10, (8,))).backward()
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        max_weight: float = 0.6,
        solver: str = "exact",
        normalise: bool = False,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(ce_weight=ce_weight, kd_weight=kd_weight, max_weight=max_weight),
            switches=dict(normalise=normalise),
        )
        checks.number("max_weight", max_weight, above=0, high=1)
        checks.one_of("solver", solver, SOLVERS)
        self.solver = self._options["solver"] = solver

    def forward(self, student_logits: Tensor, teacher_logits: Sequence[Tensor] | Tensor, target: Tensor) -> Tensor:
        student = checks.student_logits(student_logits)
        teachers = checks.teacher_logits(teacher_logits, student)
        labels = checks.target(target, student)
        return multi_teacher_kd_loss(
            student,
            teachers,
            labels,
            weights=self.weights(student, teachers, labels) if self.kd_weight != 0 else "uniform",
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )

    @torch.no_grad()
    def weights(self, student: Tensor, teachers: list[Tensor], labels: Tensor | None) -> Tensor | str:
        """a [K] in the dtype of the loss, or "uniform" where nothing else is allowed."""
        checks.one_of("solver", self.solver, SOLVERS)
        if self.max_weight * len(teachers) <= 1:
            return "uniform"
        dtype = compute_dtype(student, *teachers)
        if self.solver == "legacy_init":
            return legacy_init(len(teachers), self.max_weight, student.device).to(dtype)
        means = torch.stack([_mean_probabilities(x, labels, self.temperature) for x in (student, *teachers)]).double()
        v = means[0] - means[1:]  # times τ/N: a common factor changes no solution
        length = v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        if self.normalise:
            v = v / length[:, None]
        a = min_norm_weights(v @ v.T, self.max_weight)
        if self.normalise:
            a = a / length
            a = a / a.sum()
        return a.to(dtype)


def _mean_probabilities(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """[C], over the rows that count."""
    p = (logits.to(compute_dtype(logits)) / temperature).softmax(-1).reshape(-1, logits.shape[-1])
    if labels is None:
        return p.mean(0)
    counted = (labels != -100).reshape(-1)
    return p.masked_fill(~counted[:, None], 0).sum(0) / counted.sum().clamp(min=1)


def min_norm_weights(gram: Tensor, max_weight: float) -> Tensor:
    """argmin ½ aᵀGa under Σ a = 1, 0 <= a <= max_weight (or 1/K if that is more), for G = ``gram`` [K, K] in float64.

    Exact, without iterations or a look at the device: on every face of the feasible set (each weight at 0, free, or at
    its bound) the minimum over the affine hull is the solution of one linear system. All 3^K are solved at once, and
    the best of those that turn out feasible is the answer.
    """
    n = len(gram)
    if n > MOST_TEACHERS:
        raise ValueError(f'teacher_logits must hold at most {MOST_TEACHERS} teachers for solver="exact", got {n}')
    cap = max(max_weight, 1 / n)
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    g = gram / (gram.diagonal().mean() + torch.finfo(gram.dtype).tiny) + RIDGE * eye
    digits = torch.arange(3**n, device=gram.device)[:, None] // 3 ** torch.arange(n, device=gram.device) % 3
    free, bound = digits == 1, cap * (digits == 2).to(g.dtype)  # [3^n, n]

    rows = torch.where(free[:, :, None], g, eye)  # (G a)_i = μ where a_i is free, a_i = its bound elsewhere
    rows = torch.cat([rows, -free.to(g.dtype)[:, :, None]], 2)
    total = torch.cat([torch.ones_like(g[0]), torch.zeros_like(g[0, :1])]).expand(len(free), 1, n + 1)
    right = torch.cat([bound, torch.ones_like(bound[:, :1])], 1)
    solved = torch.linalg.solve_ex(torch.cat([rows, total], 1), right)[0][:, :n]
    a = torch.where(free, solved, bound)
    feasible = ((a >= -SLACK) & (a <= cap + SLACK)).all(1) & ((a.sum(1) - 1).abs() < SLACK)
    objective = torch.where(feasible, ((a @ g) * a).sum(1), torch.inf)
    return a.index_select(0, objective.argmin().reshape(1))[0].clamp(0, cap)


def legacy_init(n_teachers: int, max_weight: float, device: torch.device) -> Tensor:
    """Where LIBSVM's one-class solver starts: the first weights at their bound until their sum is 1."""
    cap = max(max_weight, 1 / n_teachers)
    spent = torch.arange(n_teachers, dtype=torch.float64, device=device) * cap
    return (1 - spent).clamp(0, cap)
