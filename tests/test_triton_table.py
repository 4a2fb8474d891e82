"""The table of more than four teachers, as a kernel writes it on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE

from mtkd_fast import dispatch


@pytest.mark.skipif(DEVICE == "cpu" and not dispatch.INTERPRETED, reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("n_teachers", [5, 16, 64])
def test_every_number_of_the_table_is_written(n_teachers):
    from mtkd_fast.kernels.logits import write_table

    entries = tuple((2**47 + k, 2**33 + k, -k, 1, k % 3, 2**46 + k, -(2**34), k, 1) for k in range(n_teachers))
    assert write_table(torch.device(DEVICE), entries).tolist() == [list(entry) for entry in entries]
