"""From a student's feature map to the shape of a teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn


class HintAdapter(nn.Module):
    """Resize, 1×1 convolution, batch norm, ReLU: the trainable bridge to one teacher's features.

    Args:
        student_channels, teacher_channels: the channels of the two maps.
        bias, relu: True and True in CA-MKD; False and False in Adaptive Distillation (arXiv 2110.09674).

    Called with the student's map [N, Cs, Hs, Ws] and the teacher's [N, Ct, Ht, Wt] (only its size is read; vectors
    [N, Cs] and [N, Ct] are maps of one pixel). Returns [N, Ct, Ht, Wt]. A larger map is average-pooled, a smaller one
    interpolated bilinearly, always from the student's own map. Its parameters belong in the student's optimizer.

    Source: CA-MKD (arXiv 2201.00007), section 2.2; code: models/util.py and distiller_zoo/CAMKD.py.

    >>> adapter = HintAdapter(16, 32)
    >>> adapter(torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)).shape
    torch.Size([4, 32, 4, 4])
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, bias: bool = True, relu: bool = True) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=bias),
            nn.BatchNorm2d(teacher_channels),
            *([nn.ReLU(inplace=True)] if relu else []),
        )

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        if student_feature.dim() == 2:
            return self.project(student_feature[:, :, None, None]).flatten(1)
        return self.project(resize(student_feature, teacher_feature.shape[-2:]))


def resize(feature: Tensor, size: tuple[int, int]) -> Tensor:
    if feature.shape[-2:] == size:
        return feature
    if feature.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(feature, size)
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
