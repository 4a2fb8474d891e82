"""Eight teachers, three of them poor on purpose, and the small student."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .digits import N_CLASSES, Digits, Split

TEACHER_HIDDEN, STUDENT_HIDDEN = 64, 16


class Recipe(NamedTuple):
    """What a teacher is taught: how many images, and what share of their labels is replaced by a random digit."""

    name: str
    images: int
    noise: float = 0.0
    epochs: int = 30

    @property
    def poor(self) -> bool:
        return self.images < 100 or self.noise > 0


# The noisy ones train for longer: they learn their wrong labels by heart, and are then wrong with confidence.
RECIPES = (
    *(Recipe(f"good {i + 1}", 1200) for i in range(5)),
    Recipe("20 images", 20, epochs=400),
    Recipe("noisy 1", 1200, noise=0.8, epochs=120),
    Recipe("noisy 2", 1200, noise=0.8, epochs=120),
)


def mlp(hidden: int, seed: int, device: str) -> nn.Sequential:
    """64 pixels -> hidden -> 10 logits; the same seed gives the same weights on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, N_CLASSES)).to(device)


def lesson(recipe: Recipe, data: Digits, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """The images and labels of one teacher: a bootstrap of the training images, or few of them, or wrong labels."""
    g = torch.Generator().manual_seed(seed)
    if recipe.images < len(split.train):
        chosen = torch.randperm(len(split.train), generator=g)[: recipe.images]
    elif recipe.noise:
        chosen = torch.arange(len(split.train))
    else:
        chosen = torch.randint(len(split.train), (recipe.images,), generator=g)
    index = split.train[chosen.to(split.train.device)]
    wrong = torch.rand(len(index), generator=g) < recipe.noise
    random_labels = torch.randint(N_CLASSES, (len(index),), generator=g)
    labels = torch.where(wrong.to(index.device), random_labels.to(index.device), data.labels[index])
    return data.images[index], labels
