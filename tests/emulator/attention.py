"""The distance "attention" by the emulated CUDA kernels: the functions of mtkd_fast.kernels.attention."""

import torch
from torch import Tensor

from emulator import layout
from emulator.machine import launch, poisoned


def laid_out(f: Tensor) -> Tensor:
    """As csrc/attention_ops.cpp hands it over."""
    return f if f.movedim(1, -1).is_contiguous() else f.contiguous()


def side(features: list[Tensor], of_positions: list[Tensor], weights: Tensor | None):
    """The struct of one side and the tensors that it points at."""
    args = layout.AttentionMaps()
    features = [laid_out(f) for f in features]
    args.pairs, args.samples = len(features), features[0].shape[0]
    for entry, f, numbers in zip(args.map, features, of_positions, strict=False):
        entry.data, entry.of_positions = f.data_ptr(), numbers.data_ptr()
        entry.channels, entry.positions = f.shape[1], f.shape[2:].numel()
        entry.dtype, entry.channels_last = layout.DTYPES[f.dtype], f.movedim(1, -1).is_contiguous()
    weights, args.weights_pair_stride, args.weights_sample_stride = layout.per_teacher(weights, args.samples)
    args.weights = layout.address(weights)
    return args, {f"map{k}": f for k, f in enumerate(features)} | {"weights": weights}


def named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}{k}": x for k, x in enumerate(tensors)}


def energies(features: list[Tensor], weights: Tensor | None) -> list[Tensor]:
    """-> [N, positions] of every map of one side"""
    found = [poisoned((f.shape[0], f.shape[2:].numel()), torch.float32) for f in features]
    args, inputs = side(features, found, weights)
    launch("attention_energy", args, inputs, named("energies", found))
    return found


def forward(student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """-> the distances [K, N], the slopes of every student, then of every teacher"""
    slopes = [energies(student, weights), energies(teacher, weights)]
    args = layout.AttentionPairs()
    args.pairs, args.samples = len(student), student[0].shape[0]
    for pair, f, g in zip(args.pair, *slopes, strict=False):
        pair.student, pair.teacher, pair.positions = f.data_ptr(), g.data_ptr(), f.shape[1]
    weights, args.weights_pair_stride, args.weights_sample_stride = layout.per_teacher(weights, args.samples)
    args.weights = layout.address(weights)
    distance = poisoned((args.pairs, args.samples), torch.float32)
    args.distance = distance.data_ptr()
    outputs = named("student", slopes[0]) | named("teacher", slopes[1]) | {"distance": distance}
    launch("attention_distance", args, {"weights": weights}, outputs)
    return distance, [*slopes[0], *slopes[1]]


def backward(features: list[Tensor], slopes: list[Tensor], weights: Tensor, needs: list[bool]) -> list[Tensor]:
    """-> the gradient of each map, as it lies; an empty one where none is needed."""
    args, inputs = side(features, slopes, weights)
    wanted = [
        torch.full_like(laid_out(f), float("nan")) if need else f.new_empty(0)
        for f, need in zip(features, needs, strict=True)
    ]
    for entry, gradient, need in zip(args.map, wanted, needs, strict=False):
        entry.gradient = gradient.data_ptr() if need else None
    launch("attention_gradient", args, inputs | named("slopes", slopes), named("gradient", wanted))
    return wanted
