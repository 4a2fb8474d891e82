if __name__ == "kernels":
    raise ImportError("these are the Triton kernels of mtkd_fast: import mtkd_fast.kernels")
