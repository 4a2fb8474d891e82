"""Who is measured on a case, by name: eager PyTorch and torch.compile of it, peers, anchors, and ours."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from mtkd_fast import dispatch

from . import peers
from .case import Case, Exact, Inputs, Loss

EAGER, COMPILE, COPY, LAUNCH = "eager", "compile", "copy", "launch"
ONE_THREAD = " ×1"  # after the name of an implementation, or of the copy
BASELINE, PEER, ANCHOR, OURS, FLOOR = "baseline", "peer", "anchor", "ours", "floor"
GROUPS = ("eager", "stacked", "compile", "compile-stacked", "peers", "anchors", "ours", "one-thread", "floors")


class Contender(NamedTuple):
    name: str
    kind: str
    group: str
    loss: Loss
    threads: int | None = None
    value: bool = True  # False: its value differs by what has no gradient, so that only the gradient is compared
    exact: Callable[[Inputs], Exact] | None = None  # of an anchor, which computes something else
    note: str = ""


class Missing(NamedTuple):
    name: str
    group: str
    why: str


def on(case: Case, device: str, wanted: Iterable[str] | None = None) -> tuple[list[Contender], list[Missing]]:
    """The contenders of a case, and who cannot run, and why. ``wanted``: groups and names; None: all."""
    everyone = [*_eager(case, device), *_peers(case, device), *_anchors(case, device), *_ours(case, device)]
    if wanted is not None:
        wanted = set(wanted)
        everyone = [one for one in everyone if one.group in wanted or one.name in wanted]
    return (
        [one for one in everyone if isinstance(one, Contender)],
        [one for one in everyone if isinstance(one, Missing)],
    )


def _eager(case: Case, device: str) -> Iterable[Contender | Missing]:
    for form, loss in case.eager().items():
        suffix = form.removeprefix(EAGER)
        why_not = case.why_not(form, device)
        for name, group in ((form, suffix.removeprefix("-") or EAGER), (COMPILE + suffix, COMPILE + suffix)):
            if why_not:
                yield Missing(name, group, why_not)
            else:
                yield Contender(name, BASELINE, group, loss if name == form else compiled(loss))


def _peers(case: Case, device: str) -> Iterable[Contender | Missing]:
    for peer in peers.ALL:
        entries = peer.entries_on(case)
        why_not = peer.why_not(device) if entries else None
        for name, entry in entries.items():
            if why_not:
                yield Missing(name, "peers", why_not)
                continue
            kind = ANCHOR if entry.exact else PEER
            yield Contender(name, kind, "peers", entry.make(case), None, entry.value, entry.exact, entry.note)


def _anchors(case: Case, device: str) -> Iterable[Contender | Missing]:
    for name, anchor in case.anchors(device).items():
        yield Contender(name, ANCHOR, "anchors", anchor.loss, exact=anchor.exact, note=anchor.what)


def _ours(case: Case, device: str) -> Iterable[Contender | Missing]:
    for name in implementations(device):
        loss = case.fused(name)
        yield Contender(name, OURS, "ours", loss)
        if device == "cpu" and name != "reference" and torch.get_num_threads() > 1:
            yield Contender(name + ONE_THREAD, OURS, "one-thread", loss, threads=1)


def implementations(device: str) -> list[str]:
    """Those of mtkd_fast that are measured on this device.

    Not Triton's interpreter, which is for tests; and the reference, which no one should train with, only where
    implementation=None finds nothing faster.
    """
    default = default_implementation(device)
    return [
        name
        for name, found in dispatch.implementations().items()
        if name == default
        or (device in found.devices and name != "reference" and not (name == "triton" and dispatch.INTERPRETED))
    ]


def default_implementation(device: str, dtype: torch.dtype = torch.float32) -> str:
    """What implementation=None picks."""
    return dispatch.choose(None, torch.empty(1, 1, device=device, dtype=dtype))


def compiled(loss: Loss) -> Loss:
    """torch.compile as a benchmark should use it: one graph, its shapes known."""
    return torch.compile(loss, dynamic=False, fullgraph=True)
