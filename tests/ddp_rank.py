"""One process of the distributed test. A module of its own, which a spawned process can import by its name."""

import torch
import torch.distributed as dist

from mtkd_fast import multi_teacher_kd_loss


def train_one_rank(rank: int, store: str, implementation: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    features, target = torch.randn(8, 6), torch.randint(4, (8,))
    teachers = [torch.randn(8, 4) for _ in range(2)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 4))
    mine = slice(4 * rank, 4 * rank + 4)
    loss = multi_teacher_kd_loss(
        model(features[mine]), [t[mine] for t in teachers], target[mine], weights="confidence", ce_weight=1.0,
        implementation=implementation,
    )  # fmt: skip
    loss.backward()
    found[rank] = model.module.weight.grad.tolist()
    if rank == 0:
        alone = torch.nn.Linear(6, 4)
        alone.load_state_dict(model.module.state_dict())
        multi_teacher_kd_loss(
            alone(features), teachers, target, weights="confidence", ce_weight=1.0, implementation="reference"
        ).backward()
        found["whole"] = alone.weight.grad.tolist()
    dist.destroy_process_group()
