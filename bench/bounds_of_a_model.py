"""Writes docs/bounds-of-a-model.md: what lipfast prints for a small ResNet.

Run from the root of the repository: ``python -m bench.bounds_of_a_model``.
"""

from __future__ import annotations

from pathlib import Path

import torch

import lipfast
from bench.resnet import ResNet

PAGE = Path(__file__).parent.parent / "docs" / "bounds-of-a-model.md"

_TEXT = """# The bounds of a model, and where they come from

*This page is written by `python -m bench.bounds_of_a_model`; the numbers are of random weights.*

One call bounds any model from both sides. Here a ResNet with one basic block per stage, 8 to 64
channels, on four random images of 3 x 32 x 32 (`bench/resnet.py` defines it as torchvision does):

```python
bounds = lipfast.bounds(model, images)
print(bounds)
```

```
{table}
```

* **lower, upper**: bracket of the norm of the layer's linear map between samples of its size.
  BatchNorm is folded into its neighbour (`+bn`). The upper end of a convolution's bracket holds
  for all input sizes, so on small inputs, as in the last stages here, the two ends lie apart.
* **certified**: whether the bracket is proved, and how its upper end was: by a Cholesky
  factorisation (`cholesky`), as the norm of a matrix (`matrix`), by the bound of an earlier
  kernel and that of the difference (`difference`).
* **log share**: how much of log L is the layer's. In a chain that is its logarithm. Where
  branches meet, a layer counts with the share of the branch that it is on, and what having
  several branches adds, the entropy of their shares, stands in a row of its own. *Other ops* are
  activations, pools and normalisations that no layer holds. The column adds up to 100 %; a layer
  that contracts has a negative share.

`bounds.to_pandas()` is the same table as a data frame, and a notebook shows it as HTML.
`lipfast.upper_bound(model, example)` does without samples. With wide convolutions, `rtol=1e-2`
takes a fraction of the time.

## How it is composed

```python
print(bounds.explain())
```

```
{tree}
```

A line's *factor* is what it multiplies the bound by, and *L* is the bound behind it. A join shows
its branches with their shares: those of a concatenation are shares of the sum of squares. Factors
of one are left out. `explain().steps` holds the same as objects: `Factor`, and `Join` with its
`branches`, each with its `share` and whether it `dominates`.

How far better upper bounds could come down, `bounds(..., floor=True)` says (`lipfast bounds
--floor`) of models without max pools and softmax: the largest norm of a Jacobian that slopes of
the activations make, below which no bound that ignores reachability can be. It is no bound of the
Lipschitz constant ([bounds.md](bounds.md)). Which upper bound to use:
[upper-bounds.md](upper-bounds.md).

The command line prints the same: `lipfast bounds CHECKPOINT --arch module:function --explain`;
`--json` has the numbers.
"""


def page() -> str:
    """The text of the page, computed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet((1, 1, 1, 1), width=8, classes=10).eval()
        images = torch.randn(4, 3, 32, 32)
    bounds = lipfast.bounds(model, images)
    return _TEXT.format(table=bounds, tree=bounds.explain())


if __name__ == "__main__":
    PAGE.write_text(page())
