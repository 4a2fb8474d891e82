"""Small convolutional networks on 8×8 digits, and everything a method may ask of one."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..digits import N_CLASSES

TEACHER, ASSISTANTS, STUDENT = (32, 64), ((24, 48), (12, 24)), (6, 12)  # channels of the two stages


class Outputs(NamedTuple):
    maps: tuple[Tensor, Tensor]  # [B, channels, 8, 8] and [B, channels, 4, 4]
    pooled: Tensor  # [B, channels] of the second stage
    logits: Tensor  # [B, 10]

    def apply(self, function) -> "Outputs":
        return Outputs(tuple(map(function, self.maps)), function(self.pooled), function(self.logits))


class ConvNet(nn.Module):
    def __init__(self, channels: tuple[int, int], seed: int, device: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stages = nn.ModuleList([stage(1, channels[0], stride=1), stage(*channels, stride=2)])
            self.classifier = nn.Linear(channels[1], N_CLASSES)
        self.to(device)

    def forward(self, images: Tensor) -> Outputs:
        """images [B, 64]"""
        first = self.stages[0](images.unflatten(1, (1, 8, 8)))
        second = self.stages[1](first)
        pooled = second.mean((2, 3))
        return Outputs((first, second), pooled, self.classifier(pooled))

    def head(self, feature: Tensor) -> Tensor:
        """The logits of a map of the second stage."""
        return self.classifier(feature.mean((2, 3)))


def stage(before: int, after: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())
