"""One process of the distributed tests. A module of its own, which a spawned process can import by its name."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtkd_fast import AdaptiveDistillationLoss, AMTMLKDLoss, GroupHints, feature_map_loss, multi_teacher_kd_loss

N, WIDTH, CLASSES, TEACHERS = 8, 6, 4, 2


class Confidence(nn.Module):
    """A student and a loss without parameters."""

    def __init__(self, implementation: str):
        super().__init__()
        self.implementation = implementation
        self.student = nn.Linear(WIDTH, CLASSES)

    def forward(self, features, maps, teachers, teacher_maps, target):
        return multi_teacher_kd_loss(
            self.student(features), list(teachers.unbind(1)), target, weights="confidence", ce_weight=1.0,
            implementation=self.implementation,
        )  # fmt: skip


class Learnable(nn.Module):
    """A student and losses that learn: the terms that are means over samples, as a batch in parts has them."""

    def __init__(self, implementation: str):
        super().__init__()
        self.student = nn.Linear(WIDTH, CLASSES)
        self.amtml = AMTMLKDLoss(
            TEACHERS, WIDTH, GroupHints([3], [5]), distance_weight=0.0, angle_weight=0.0, seed=1,
            implementation=implementation,
        )  # fmt: skip
        self.adaptive = AdaptiveDistillationLoss(["map"], implementation=implementation)

    def forward(self, features, maps, teachers, teacher_maps, target):
        logits, teachers = self.student(features), list(teachers.unbind(1))
        path = feature_map_loss([logits[:, :, None, None]], [teachers[0][:, :, None, None]])
        loss = self.amtml(logits, teachers, target, features, [maps], [teacher_maps])
        return loss + self.adaptive(logits, target, {"map": path})


MODELS = {"confidence": Confidence, "learnable": Learnable}


def train_one_rank(rank: int, store: str, name: str, implementation: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    batch = (
        torch.randn(N, WIDTH), torch.randn(N, 3, 2, 2), torch.randn(N, TEACHERS, CLASSES), torch.randn(N, 5, 2, 2),
        torch.randint(CLASSES, (N,)),
    )  # fmt: skip
    model = DistributedDataParallel(MODELS[name](implementation))
    half = N // 2
    model(*(x[half * rank : half * (rank + 1)] for x in batch)).backward()
    found[rank] = gradients(model.module)
    if rank == 0:
        alone = MODELS[name]("reference")
        alone.load_state_dict(model.module.state_dict())
        alone(*batch).backward()
        found["whole"] = gradients(alone)
    dist.destroy_process_group()


def gradients(model: nn.Module) -> dict[str, list]:
    return {name: x.grad.tolist() for name, x in model.named_parameters()}
