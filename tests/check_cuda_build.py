"""Fails unless the CUDA kernels were built, load here, and are known to the dispatcher.

Run by .ci/run where nvcc is; no GPU is needed. Under a CUDA build of torch (`make test-cuda-torch`)
torch's functions have to be bound, too, whatever torch the kernels were built against.
"""

from __future__ import annotations

import sys

import torch

from lipfast import _native

WITH_CUDA = (
    *("chain_jacobian_norms", "chain_secants_points", "chain_secants_quotients"),
    *("cholesky_bounds", "hermitian_residual", "jacobian_reduction"),
    *("shifted_grams", "spectral_norms", "stack", "symbol_grams", "tap_products"),
)


def main() -> None:
    info = _native.cuda_info()
    if info is None:
        sys.exit(f"nvcc is here, and the CUDA kernels are not: {_native.cuda_reason()}")
    for op in WITH_CUDA:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lipfast::{op}", "CUDA"):
            sys.exit(f"lipfast::{op} has no CUDA kernel")
        sys.stdout.write(f"lipfast::{op}: CUDA kernel registered\n")
    if torch.version.cuda is not None:
        from lipfast import _C_cuda  # noqa: PLC0415 - there is one only where it was built

        if not _C_cuda.bound_to_torch():
            sys.exit(f"torch {torch.__version__} has CUDA, and its functions are not bound")
        sys.stdout.write(f"torch's functions for CUDA {torch.version.cuda} are bound\n")
    built = f"{info['nvcc']}, {info['architectures']}, built with torch {info['torch']}"
    sys.stdout.write(f"{built}, loaded by {torch.__version__}\n")


if __name__ == "__main__":
    main()
