"""DGKD: densely guided distillation, every model taught by all larger ones, some guides left out at random."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mtkd_fast import checks
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.losses.module import DistillationLoss
from mtkd_fast.reference.kd import compute_dtype

Model = TypeVar("Model", bound=nn.Module)
RESCALES = ("none", "survivors")


class DGKDLoss(DistillationLoss):
    """G · (1 − λ) · CE + λ · τ² · mean over rows of Σ_g c_g KL(p_g‖q) over G guides: the teacher and its assistants.

    Args:
        temperature: τ. The official script: 5.
        kd_weight: λ in [0, 1]. The official script: 1, which leaves the labels out; the paper's could not be read.
        official_code: False, the paper's equation, the sum over guides of (1 − λ) CE + λ τ² KL_g. True, the numbers
            of the official script: one (1 − λ) CE, and the KL's mean over rows and classes (a factor of 1/C).
        implementation: as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with
        student_logits [N, C],
        guide_logits: G entries, a tensor [N, C] or, for a guide that was left out and need not have run, None,
        target [N] (None if λ = 1),
        keep: G numbers c_g on the host, as :class:`GuideSampler` draws them; a guide of 0 is not read. None: ones.
    G counts the guides that were left out, too. Under torch.compile(fullgraph=True) every new pattern of ``keep``
    is another graph: compile the models rather than this loss.

    Gradient: to the student's logits.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: arXiv 2009.08825, equation 7 as restated in secondary notes; code: github.com/wonchulSon/DGKD.

    >>> sampler, loss = GuideSampler(3, survival=0.75), DGKDLoss(kd_weight=0.7)
    >>> keep = sampler()  # before the guides run, so that those left out do not
    >>> guides = [torch.randn(8, 10) if c else None for c in keep]
    >>> student = torch.randn(8, 10, requires_grad=True)
    >>> loss(student, guides, torch.randint(10, (8,)), keep).backward()
    """

    def __init__(
        self,
        temperature: float = 5.0,
        kd_weight: float = 1.0,
        official_code: bool = False,
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            implementation=implementation,
            numbers=dict(kd_weight=kd_weight),
            switches=dict(official_code=official_code),
        )
        checks.number("kd_weight", kd_weight, low=0, high=1)

    def forward(
        self,
        student_logits: Tensor,
        guide_logits: Sequence[Tensor | None] | Tensor,
        target: Tensor | None = None,
        keep: Sequence[float] | None = None,
    ) -> Tensor:
        student = checks.student_logits(student_logits)
        guides = _guides(guide_logits)
        if target is None and self.kd_weight != 1:
            raise ValueError(f"target must be given for the hard label, since kd_weight = {self.kd_weight}; got None")
        factors = _factors(guides, keep)
        for g, guide in enumerate(guides):
            if factors[g] != 0:
                checks.logits_dtype(f"guide_logits[{g}]", checks.tensor(f"guide_logits[{g}]", guide))
                checks.logits_like(f"guide_logits[{g}]", guide, student, "student_logits")
        read = [(guide, c) for guide, c in zip(guides, factors, strict=True) if c != 0]
        scale = self.kd_weight / (student.shape[-1] if self.official_code else 1)
        weights, scale = _as_weights([c for _, c in read], scale, student)
        return multi_teacher_kd_loss(
            student,
            [guide for guide, _ in read] or [student.detach()],  # nobody to read: kd_weight is 0 then
            target,
            weights=weights,
            temperature=self.temperature,
            kd_weight=scale,
            ce_weight=(1 - self.kd_weight) * (1 if self.official_code else len(guides)),
            implementation=self.implementation,
        )


def _guides(value: object) -> list[Tensor | None]:
    if (
        not isinstance(value, Sequence | Tensor)
        or isinstance(value, str)
        or (isinstance(value, Tensor) and not value.dim())
    ):
        raise TypeError(f"guide_logits must be a sequence of G tensors or None, got {type(value).__name__}")
    guides = list(value)
    if not 1 <= len(guides) <= checks.MAX_TEACHERS:
        raise ValueError(f"guide_logits must hold 1 to {checks.MAX_TEACHERS} guides, got {len(guides)}")
    return guides


def _factors(guides: list[Tensor | None], keep: Sequence[float] | None) -> list[float]:
    """c_g, and 0 for a guide that is not there."""
    if keep is None:
        return [float(guide is not None) for guide in guides]
    if not isinstance(keep, Sequence) or isinstance(keep, str):
        raise TypeError(f"keep must be a sequence of {len(guides)} numbers on the host, got {type(keep).__name__}")
    if len(keep) != len(guides):
        raise ValueError(f"keep must hold {len(guides)} numbers, one a guide, got {len(keep)}")
    for g, (guide, c) in enumerate(zip(guides, keep, strict=True)):
        checks.number(f"keep[{g}]", c)
        if c != 0 and guide is None:
            raise ValueError(f"guide_logits[{g}] must be there, since keep[{g}] = {c}; got None")
    return [float(c) for c in keep]


def _as_weights(factors: list[float], scale: float, student: Tensor) -> tuple[str | Tensor, float]:
    """Guides of one factor need no tensor of weights: "uniform" is 1/K each."""
    if len(set(factors)) <= 1:
        return "uniform", scale * sum(factors)
    like = dict(dtype=compute_dtype(student), device=student.device)
    return torch.stack([torch.full((), c, **like) for c in factors]), scale  # filled there: an upload would wait


class GuideSampler:
    """Stochastic teaching: which of G guides teach in this step, as G numbers, 0 for those left out.

    Args:
        n_guides: G, the teacher first.
        drop: leave out exactly so many, uniformly at random (the official script: 1, the teacher included).
        survival: or keep each with this probability, independently (the paper's best: 0.75). Give one of the two.
        keep_teacher: never leave out guide 0.
        at_least_one: with ``survival``, if nobody is left, keep one guide, uniformly at random.
        rescale: "none", kept guides count 1 (script and paper), or "survivors", G/kept each.
        generator: on the CPU; None is PyTorch's own. Processes that train one model need generators of the same seed.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    >>> GuideSampler(4, drop=1, generator=torch.Generator().manual_seed(0))().count(0.0)
    1
    """

    def __init__(
        self,
        n_guides: int,
        *,
        drop: int | None = None,
        survival: float | None = None,
        keep_teacher: bool = False,
        at_least_one: bool = True,
        rescale: str = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        checks.integer("n_guides", n_guides)
        if n_guides < 1:
            raise ValueError(f"n_guides must be at least 1, got {n_guides}")
        checks.flag("keep_teacher", keep_teacher)
        checks.flag("at_least_one", at_least_one)
        checks.one_of("rescale", rescale, RESCALES)
        if (drop is None) == (survival is None):
            raise ValueError(f"drop or survival must be given, and not both, got drop={drop}, survival={survival}")
        if survival is not None:
            checks.number("survival", survival, low=0, high=1)
        else:
            checks.integer("drop", drop)
            most = n_guides - (keep_teacher or at_least_one)
            if not 0 <= drop <= most:
                raise ValueError(f"drop must be in [0, {most}], got {drop}")
        self.n_guides, self.drop, self.survival = n_guides, drop, survival
        self.keep_teacher, self.at_least_one, self.rescale = keep_teacher, at_least_one, rescale
        self.generator = generator

    def __call__(self) -> list[float]:
        chance = torch.rand(self.n_guides, generator=self.generator)
        if self.keep_teacher:
            chance[0] = -1.0 if self.survival is not None else 2.0
        kept = (chance < self.survival) if self.survival is not None else self._all_but_the_lowest(chance)
        if self.at_least_one and not kept.any():
            kept[chance.argmin()] = True
        factor = self.n_guides / kept.sum().item() if self.rescale == "survivors" and kept.any() else 1.0
        return [factor if keep else 0.0 for keep in kept.tolist()]

    def _all_but_the_lowest(self, chance: Tensor) -> Tensor:
        kept = torch.ones(self.n_guides, dtype=torch.bool)
        kept[chance.argsort()[: self.drop]] = False
        return kept


def dense_chain(models: Sequence[Model], train: Callable[[Model, Sequence[Model]], object]) -> list[object]:
    """Teacher → assistants → student: calls ``train(model, guides)`` down the chain; the guides are all larger models.

    Args:
        models: from the largest, which is trained already, to the student.
        train: trains its first argument, for instance with :class:`DGKDLoss`; the guides come in evaluation mode, the
            teacher first.

    Returns: what ``train`` returned, for every model but the first.

    Source: arXiv 2009.08825, section 3; the official script trains one model a run and is run once a model.

    >>> nets = [nn.Linear(4, 2) for _ in range(3)]
    >>> dense_chain(nets, lambda model, guides: len(guides))
    [1, 2]
    """
    if len(models) < 2:
        raise ValueError(f"models must hold a teacher and at least one model to train, got {len(models)}")
    results = []
    for i in range(1, len(models)):
        for guide in models[:i]:
            guide.eval()
        models[i].train()
        results.append(train(models[i], models[:i]))
    return results
