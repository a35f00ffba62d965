"""Fails unless the CUDA kernels were built, load here, and are known to the dispatcher.

Run by .ci/run where nvcc is; no GPU is needed.
"""

from __future__ import annotations

import sys

import torch

from lipfast import _native
from lipfast.ops import (
    chain_jacobian_norms,
    cholesky_residual,
    jacobian_reduction,
    spectral_norms,
)

WITH_CUDA = (chain_jacobian_norms, cholesky_residual, jacobian_reduction, spectral_norms)


def main() -> None:
    info = _native.cuda_info()
    if info is None:
        sys.exit(f"nvcc is here, and the CUDA kernels are not: {_native.cuda_reason()}")
    for module in WITH_CUDA:
        op = module.__name__.rsplit(".", 1)[1]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lipfast::{op}", "CUDA"):
            sys.exit(f"lipfast::{op} has no CUDA kernel")
        sys.stdout.write(f"lipfast::{op}: CUDA kernel registered\n")
    sys.stdout.write(f"{info['nvcc']}, {info['architectures']}, torch {torch.__version__}\n")


if __name__ == "__main__":
    main()
