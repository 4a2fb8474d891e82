"""Adaptive Distillation: several paths from one teacher, each with a weight that is learned beside the student."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtkd_fast import checks
from mtkd_fast.kd import multi_teacher_kd_loss
from mtkd_fast.reference.kd import compute_dtype

AGGREGATIONS = ("adaptive", "equal", "fixed")


class AdaptiveDistillationLoss(nn.Module):
    """ce_weight · CE + distill_weight · (Σ_i e^{−α_i} c_i L_i + Σ_i α_i) over P path losses L_i, each α_i learned.

    ∂/∂α_i = distill_weight · (1 − e^{−α_i} c_i L_i): α_i settles at log(c_i L_i), where every path counts alike however
    large it is, and c_i no longer matters but to a weight decay, which pulls α_i towards 0.

    Args:
        paths: the names of the path losses; or a mapping from each name to its number of losses, L for a path that
            comes as a vector [L], a loss a layer, each with its own α. Where α is learned, no name may hold a "." or be
            that of an attribute of a module, since PyTorch's parameters have no such names.
        aggregation: "adaptive", the objective above. "equal", Σ_i L_i. "fixed", Σ_i c_i L_i. The last two have no α.
        path_weights: c_i by name, for all losses of that path; 1 where none is given. Above 0 where α is learned. In
            "fixed", which needs them, a path of weight 0 is left out. The code's adaptive runs: 1; its hand-tuned runs:
            1000 for attention transfer, 0.1 for the soft target.
        ce_weight, distill_weight: 1 and 1 in the code. With a distill_weight of 0 no path loss counts, and α gets no
            gradient.
        min_alpha: None, α is free, as in the code: a path whose loss goes to 0 drives its α towards −inf and its
            weight e^{−α} to +inf. A number: the forward pass in training mode first raises α to it in place, outside
            the graph; the gradient is never clamped. Weights then stay at or below e^{−min_alpha} c_i.
        implementation: of the hard label, as in :func:`mtkd_fast.multi_teacher_kd_loss`.

    Called with
        student_logits [N, C], target [N] (-100 is ignored; None if ce_weight is 0),
        path_losses: a mapping from every name of ``paths`` to a scalar, or to [L].

    Gradient: to the student's logits, to every path loss (scaled on the device, no host waits) and to α.

    ``alpha[name]``, [] or [L], are ordinary parameters ``alpha.<name>``, 0 at first: give ``loss.parameters()`` to the
    student's optimizer, as the code does (SGD, learning rate 0.1, momentum 0.9, weight decay 1e-4, the decay on α
    included), and ``loss.state_dict()`` to the checkpoint, which holds each α by the name of its path. Under
    DistributedDataParallel wrap student, adapters and this loss as one module, or each process learns an α of its own.

    Raises: TypeError, ValueError, naming the argument, what was expected and what came.

    Source: arXiv 2110.09674; formulas and defaults from its code, github.com/wyze-AI/AdaptiveDistillation. The paper's
    own parametrisation could not be read.

    A training step with adapters, here on two stages:

    >>> from mtkd_fast import HintAdapter, attention_transfer_loss, multi_teacher_kd_loss, nst_loss
    >>> class Net(nn.Module):
    ...     def __init__(self, *widths):
    ...         super().__init__()
    ...         pairs = zip((3, *widths), widths)
    ...         self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairs)
    ...         self.head = nn.Linear(widths[-1], 10)
    ...     def forward(self, x):
    ...         maps = []
    ...         for stage in self.stages:
    ...             x = stage(x).relu()
    ...             maps.append(x)
    ...         return maps, self.head(x.mean((2, 3)))
    >>> student, teacher = Net(4, 8), Net(8, 16).eval().requires_grad_(False)
    >>> adapters = nn.ModuleList(HintAdapter(i, o, bias=False, relu=False) for i, o in ((4, 8), (8, 16)))
    >>> loss = AdaptiveDistillationLoss({"nst": 2, "attention": 2, "soft target": 1})  # layer by layer, and one
    >>> learned = [*student.parameters(), *adapters.parameters(), *loss.parameters()]
    >>> optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> for _ in range(2):
    ...     images, target = torch.randn(6, 3, 16, 16), torch.randint(10, (6,))
    ...     with torch.no_grad():
    ...         teacher_maps, teacher_logits = teacher(images)
    ...     maps, logits = student(images)
    ...     adapted = [adapt(f, g) for adapt, f, g in zip(adapters, maps, teacher_maps)]
    ...     total = loss(logits, target, {
    ...         "nst": nst_loss(adapted, teacher_maps, per_stage=True),
    ...         "attention": attention_transfer_loss(maps, teacher_maps, per_stage=True),
    ...         "soft target": multi_teacher_kd_loss(logits, [teacher_logits], temperature=4.0),
    ...     })
    ...     optimizer.zero_grad()
    ...     total.backward()
    ...     optimizer.step()
    >>> sorted(loss.weights())  # what each path is multiplied by now
    ['attention', 'nst', 'soft target']
    """

    def __init__(
        self,
        paths: Sequence[str] | Mapping[str, int],
        aggregation: str = "adaptive",
        *,
        path_weights: Mapping[str, float] | None = None,
        ce_weight: float = 1.0,
        distill_weight: float = 1.0,
        min_alpha: float | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("aggregation", aggregation, AGGREGATIONS)
        checks.number("ce_weight", ce_weight)
        checks.number("distill_weight", distill_weight)
        self.paths = _sizes(paths)
        self.aggregation, self.ce_weight, self.distill_weight = aggregation, ce_weight, distill_weight
        self.path_weights = _path_weights(path_weights, self.paths, aggregation)
        if min_alpha is not None:
            checks.number("min_alpha", min_alpha)
            if aggregation != "adaptive":
                raise ValueError(f'min_alpha bounds the α of aggregation="adaptive", got aggregation={aggregation!r}')
        self.min_alpha, self.implementation = min_alpha, implementation
        self._read = {name: size for name, size in self.paths.items() if self.path_weights[name] != 0}
        self.alpha = _alphas(self._read) if aggregation == "adaptive" else None

    def forward(self, student_logits: Tensor, target: Tensor | None, path_losses: Mapping[str, Tensor]) -> Tensor:
        checks.student_logits(student_logits)
        if target is None and self.ce_weight != 0:
            raise ValueError(f"target must be given for the hard label, since ce_weight = {self.ce_weight}; got None")
        losses = self._losses(path_losses)
        hard = multi_teacher_kd_loss(
            student_logits,
            [student_logits.detach()],  # not read
            target,
            kd_weight=0.0,
            ce_weight=self.ce_weight,
            implementation=self.implementation,
        )
        if self.distill_weight == 0 or losses is None:
            return hard
        if self.alpha is None:
            return hard + self.distill_weight * losses.sum()
        if self.min_alpha is not None and self.training:
            with torch.no_grad():
                for alpha in self.alpha.values():
                    alpha.clamp_(min=self.min_alpha)
        alpha = torch.cat([alpha.reshape(-1) for alpha in self.alpha.values()])
        return hard + self.distill_weight * ((-alpha).exp() * losses + alpha).sum()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor | float]:
        """By path, what its losses are multiplied by: e^{−α_i} c_i, [] or [L] on the device; without α just c_i."""
        if self.alpha is None:
            return dict(self.path_weights)
        return {name: self.path_weights[name] * (-alpha).exp() for name, alpha in self.alpha.items()}

    def _losses(self, given: Mapping[str, Tensor]) -> Tensor | None:
        """c_i L_i, [P], of the paths whose weight is not 0, in the order of ``paths``."""
        if not isinstance(given, Mapping):
            raise TypeError(f"path_losses must be a mapping from names to tensors, got {type(given).__name__}")
        unknown, missing = [name for name in given if name not in self.paths], self._read.keys() - given.keys()
        if unknown or missing:
            raise ValueError(f"path_losses must hold {', '.join(self.paths)}, got {', '.join(map(str, given))}")
        flat = []
        for name, size in self._read.items():
            loss = checks.tensor(f"path_losses[{name!r}]", given[name])
            if not loss.is_floating_point():
                raise TypeError(f"path_losses[{name!r}] must be floating point, got {loss.dtype}")
            if tuple(loss.shape) not in (((), (1,)) if size == 1 else ((size,),)):
                wanted = "a scalar" if size == 1 else f"of shape ({size},)"
                raise ValueError(f"path_losses[{name!r}] must be {wanted}, got shape {tuple(loss.shape)}")
            if self.alpha is not None:
                checks.same_device(f"path_losses[{name!r}]", loss, self.alpha[name], f"alpha[{name!r}]")
            flat.append(self.path_weights[name] * loss.reshape(size).to(compute_dtype(loss)))
        return torch.cat(flat) if flat else None

    def extra_repr(self) -> str:
        shown = ("paths", "aggregation", "path_weights", "ce_weight", "distill_weight", "min_alpha")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


def _alphas(sizes: dict[str, int]) -> nn.ParameterDict:
    """0 for every loss: [] for a path of one, else [L]."""
    alphas = nn.ParameterDict()
    for name, size in sizes.items():
        if "." in name or name == "" or hasattr(alphas, name):
            raise ValueError(f"paths must hold names that a parameter can have, without '.', got {name!r}")
        alphas[name] = nn.Parameter(torch.zeros(() if size == 1 else size))
    return alphas


def _sizes(paths: object) -> dict[str, int]:
    if isinstance(paths, str) or not isinstance(paths, Sequence | Mapping):
        raise TypeError(f"paths must be a sequence of names or a mapping from names, got {type(paths).__name__}")
    sizes = dict(paths) if isinstance(paths, Mapping) else dict.fromkeys(paths, 1)
    if not sizes or len(sizes) != len(paths):
        raise ValueError(f"paths must hold one or more names, each once, got {list(paths)}")
    for name, size in sizes.items():
        if not isinstance(name, str):
            raise TypeError(f"paths must hold names, got {type(name).__name__}")
        checks.integer(f"paths[{name!r}]", size)
        if size < 1:
            raise ValueError(f"paths[{name!r}] must be at least 1, got {size}")
    return sizes


def _path_weights(given: Mapping[str, float] | None, sizes: dict[str, int], aggregation: str) -> dict[str, float]:
    if (given is None and aggregation == "fixed") or (given is not None and aggregation == "equal"):
        expected = "be given" if aggregation == "fixed" else "not be given"
        raise ValueError(f"path_weights must {expected} with aggregation={aggregation!r}, got {given}")
    if given is None:
        return dict.fromkeys(sizes, 1.0)
    if not isinstance(given, Mapping):
        raise TypeError(f"path_weights must be a mapping from names to numbers, got {type(given).__name__}")
    for name, value in given.items():
        if name not in sizes:
            raise ValueError(f"path_weights must hold names of paths ({', '.join(sizes)}), got {name!r}")
        if aggregation == "adaptive":
            checks.number(f"path_weights[{name!r}]", value, above=0)
        else:
            checks.number(f"path_weights[{name!r}]", value)
    return {name: float(given.get(name, 1.0)) for name in sizes}
