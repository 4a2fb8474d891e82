"""The data: 1797 handwritten digits of 8x8 pixels, part of scikit-learn, and how one split shares them out.

Of 1200 training images, the student owns the labels of 200 and sees no others; its teachers have learned from more.
Every image the student trains on has a label, since confidence weights judge a teacher by the label. The other 597
images are the test set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

N_TRAIN = 1200
N_STUDENT = 200
N_CLASSES = 10


class Split(NamedTuple):
    train: Tensor  # indices of images
    student: Tensor  # the first N_STUDENT of train
    test: Tensor


class Digits(NamedTuple):
    images: Tensor  # [1797, 64], pixels in [0, 1]
    labels: Tensor  # [1797]

    def split(self, seed: int) -> Split:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        order = order.to(self.labels.device)
        return Split(order[:N_TRAIN], order[:N_STUDENT], order[N_TRAIN:])


def load(device: str) -> Digits:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Digits(torch.tensor(pixels / 16, dtype=torch.float32, device=device), torch.tensor(labels, device=device))
