"""Measurements of mtkd_fast: the benchmark of every op, the demo on real data, and the run on a GPU machine."""

if __name__ == "bench":
    raise ImportError("this folder is installed as mtkd_fast.bench: import it by that name")
