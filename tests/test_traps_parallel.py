"""Traps of threads, processes and shards."""

import subprocess
import sys

import pytest
import torch
from cases.kd import BF16, F32, check
from cases.threads import using_threads

FORKED = """
import multiprocessing, pytest, torch
from mtkd_fast import multi_teacher_kd_loss

student, teachers = torch.randn(600, 100), torch.randn(2, 600, 100)

def loss(_=None):
    return multi_teacher_kd_loss(student, teachers).item()

if __name__ == "__main__":
    right = loss()  # has started the threads of this process
    with multiprocessing.get_context("{method}").Pool(2, torch.set_num_threads, (1,)) as pool:
        found = pool.map(loss, range(2), chunksize=1)
    assert {check}, (found, right)
"""


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(301, 100), (7, 20000), (1, 300)])
def test_trap_35_one_thread_and_many_give_the_same_bits(backend, shape, dtype):
    if backend.implementation != "cpp" or backend.device != "cpu":
        pytest.skip("only the C++ op on the CPU has threads of its own")
    student, *teachers = (torch.randn(*shape).to(dtype) for _ in range(3))
    student.requires_grad_()
    target = torch.randint(shape[1], shape[:1])

    def once(n_threads):
        with using_threads(n_threads):
            loss = backend.loss(student, teachers, target, weights="confidence", ce_weight=1.0)
            return loss.detach(), torch.autograd.grad(loss, student)[0]

    one = once(1)
    for n_threads in (2, 5):
        many = once(n_threads)
        assert torch.equal(one[1], many[1])
        torch.testing.assert_close(one[0], many[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "check"), [("fork", "found == pytest.approx([right] * 2)"), ("spawn", "all(x > 0 for x in found)")]
)
def test_trap_35_in_the_workers_of_a_data_loader(method, check, tmp_path):
    """One thread each, as torch.utils.data sets; a forked child has its parent's other threads in name only."""
    script = tmp_path / "workers.py"
    script.write_text(FORKED.format(method=method, check=check))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flush", [False, True])
def test_trap_35_denormal_logits(backend, flush):
    if backend.device != "cpu":
        pytest.skip("a matter of the CPU's floating point mode")
    student, teacher = 1e-39 * torch.randn(4, 50), 1e-40 * torch.randn(4, 50)
    torch.set_flush_denormal(flush)
    try:
        check(backend, student, [teacher], reduction="none")
        check(backend, student * 1e39, [teacher], reduction="none", temperature=0.05)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("shards", [2, 3])
def test_trap_36_data_parallel_shards_with_the_global_count_add_up_to_the_whole(backend, shards):
    """Each rank divides by the all-reduced number of rows that count, not by its own."""
    student, *teachers = (torch.randn(9, 30, device=backend.device) for _ in range(3))
    target = torch.randint(30, (9,), device=backend.device)
    target[:4] = -100
    student.requires_grad_()
    kwargs = dict(weights="confidence", ce_weight=1.0, temperature=2.0)
    whole = backend.loss(student, teachers, target, **kwargs)
    items = (target != -100).sum()
    parts = [
        backend.loss(student[i::shards], [t[i::shards] for t in teachers], target[i::shards], num_items=items, **kwargs)
        for i in range(shards)
    ]
    torch.testing.assert_close(sum(parts), whole)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, sum(parts))]
    torch.testing.assert_close(*gradients)
