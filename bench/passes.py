"""What is timed: loss and gradient together, the loss alone, the backward call alone, or a replayed CUDA graph."""

from typing import NamedTuple

import torch

from .case import Inputs, Loss
from .gate import WrongResult
from .timing import Call

BOTH, FORWARD, BACKWARD, GRAPH = "loss + gradient", "forward", "backward", "graph"
GRAPH_TOLERANCE = 1e-3  # of a replay from a plain call of the same kernels


class Step(NamedTuple):
    """One contender on its rotating inputs."""

    loss: Loss
    sets: list[Inputs]

    def both(self, i: int) -> None:
        self.loss(*self.sets[i % len(self.sets)].fresh()).backward()

    def forward(self, i: int) -> None:
        with torch.no_grad():
            self.loss(*self.sets[i % len(self.sets)].arguments)

    def graph_of(self, i: int) -> torch.Tensor:
        return self.loss(*self.sets[i % len(self.sets)].fresh())


def call(of: str, loss: Loss, sets: list[Inputs], threads: int | None = None) -> Call:
    step = Step(loss, sets)
    if of == BOTH:
        return Call(step.both, threads=threads)
    if of == FORWARD:
        return Call(step.forward, threads=threads)
    if of == BACKWARD:
        return Call(torch.Tensor.backward, prepare=step.graph_of, threads=threads)
    return Call(replay(loss, sets[0]))


def replay(loss: Loss, inputs: Inputs):
    """Loss and gradients captured once, replayed at every call: the device's time without the host's."""
    arguments = inputs.fresh()
    leaves = inputs.leaves(arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(*arguments), leaves)
    torch.cuda.current_stream().wait_stream(side)
    plain = torch.autograd.grad(loss(*arguments), leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(loss(*arguments), leaves)
    for gradient in captured:
        gradient.zero_()
    graph.replay()
    for gradient, expected in zip(captured, plain, strict=True):
        limit = GRAPH_TOLERANCE * expected.abs().max().item()
        if not torch.allclose(gradient, expected, rtol=GRAPH_TOLERANCE, atol=limit):
            raise WrongResult("the replayed graph gives another gradient")

    def call(_: int, kept=(graph, captured)) -> None:  # the graph writes to ``captured``, which must stay alive
        graph.replay()

    return call
