"""The kernels beside what a competent PyTorch user would run on the same GPU.

``python -m bench.gpu_against_torch``, a part of ``make gpu-day``. One block per case: lipfast's
milliseconds, those of each way in torch and how many times as long it takes. Wall-clock time with a
synchronisation at both ends, so what the host does counts; medians, after two calls to warm up.
None of torch's ways proves anything; float32 eigenvalues of a Gram matrix lose half of the digits.
``--device cpu --tiny`` shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import lipfast
from bench.baselines import (
    POWER_ITERATIONS,
    fft_conv_norm,
    gram_norms,
    vmap_jacobian_norms,
)

TURNS = 5
LONG = 2.0  # seconds after which one turn has to do


@dataclass(frozen=True)
class Case:
    """A call of lipfast and ways to do the same in torch.

    Attributes:
        name: what is computed.
        ours: the call.
        others: name -> call.
        cpu: the call on the CPU's two threads, and what part of the case it does.
    """

    name: str
    ours: Callable[[], object]
    others: Mapping[str, Callable[[], object]]
    cpu: tuple[Callable[[], object], float] | None = None


@dataclass(frozen=True)
class Setting:
    """Where cases run, and whether in a size that only shows that they do."""

    device: torch.device
    tiny: bool

    def sized(self, full: int, tiny: int) -> int:
        """One of both."""
        return tiny if self.tiny else full

    def random(self, *shape: int) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(shape, device=self.device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in which the device ends its work."""

    def once() -> float:
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - started

    if once() > LONG:  # the first one, allocations and compilation of plans included, is no figure
        return 1e3 * once()
    once()
    return 1e3 * statistics.median(once() for _ in range(TURNS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 in TF32, as ``torch.set_float32_matmul_precision("high")`` has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_tf32(call: Callable[[], object]) -> Callable[[], object]:
    """A call with products in TF32."""

    def run() -> object:
        with tf32():
            return call()

    return run


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call as a CUDA graph, captured when it is first needed; a replay is one launch."""
    if device.type != "cuda":
        return call
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> object:
        if not graphs:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graphs.append(graph)
        graphs[0].replay()
        return None

    return replay


def power_iteration(matrices: Tensor, passes: int = POWER_ITERATIONS) -> Tensor:
    """Spectral norms of (N, n, m) by batched power iteration."""
    v = torch.ones(len(matrices), matrices.shape[2], 1, device=matrices.device)
    v = v / v.norm(dim=1, keepdim=True)
    for _ in range(passes):
        u = matrices @ v
        u = u / u.norm(dim=1, keepdim=True)
        v = matrices.mT @ u
        size = v.norm(dim=1, keepdim=True)
        v = v / size
    norms: Tensor = size.flatten()
    return norms


def explicit_jacobians(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Jacobians (N, B, K, D) of N ReLU networks by batched products; weights are (N, out, in)."""
    h = x.expand(len(weights[0]), *x.shape)
    slopes = []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        z = torch.baddbmm(bias.unsqueeze(1), h, weight.mT)
        slopes.append(z > 0)
        h = z.relu()
    networks, batch, outputs = len(weights[0]), len(x), weights[-1].shape[1]
    jacobian = weights[-1].unsqueeze(1).expand(-1, batch, -1, -1)
    for weight, slope in zip(weights[-2::-1], slopes[::-1], strict=True):
        jacobian = (jacobian * slope.unsqueeze(2)).reshape(networks, batch * outputs, -1) @ weight
        jacobian = jacobian.reshape(networks, batch, outputs, -1)
    return jacobian


def power_norms(jacobian: Tensor, passes: int = 20) -> Tensor:
    """Largest singular values of (B, K, D) by power iteration on the Gram matrices."""
    gram = jacobian @ jacobian.mT
    v = gram[:, :, :1]
    for _ in range(passes):
        v = gram @ v
        v = v / v.norm(dim=1, keepdim=True)
    norms: Tensor = (gram @ v).norm(dim=1).flatten().sqrt()
    return norms


def spectral_case(name: str, stacks: Sequence[Tensor], *, certify: bool) -> Case:
    """Spectral norms of stacks (N, n, m) of matrices."""
    matrices = [matrix for stack in stacks for matrix in stack.unbind()]

    def double_gram() -> object:
        return [
            torch.linalg.eigvalsh(s @ s.mT if s.shape[1] <= s.shape[2] else s.mT @ s)[:, -1]
            for s in (stack.double() for stack in stacks)
        ]

    def powers() -> object:
        return [power_iteration(stack) for stack in stacks]

    device = stacks[0].device
    part = max(1, len(matrices) // 20)
    host = [matrix.cpu() for matrix in matrices[::part]]
    return Case(
        f"{name}, {'certified' if certify else 'estimates'}",
        lambda: lipfast.spectral_norms(matrices, certify=certify),
        {
            "svdvals": lambda: [torch.linalg.svdvals(stack) for stack in stacks],
            "eigvalsh of float64 Gram matrices": double_gram,
            f"{POWER_ITERATIONS} power iterations": powers,
            f"{POWER_ITERATIONS} power iterations, CUDA graph": captured(powers, device),
        },
        (lambda: lipfast.spectral_norms(host, certify=certify), len(host) / len(matrices)),
    )


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """ReLU between linear layers."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)


def checkpoints_case(setting: Setting, networks: int, batch: int, widths: Sequence[int]) -> Case:
    """Both bounds of many checkpoints of one perceptron."""
    shapes = list(pairwise(widths))
    weights = [setting.random(networks, b, a) / a**0.5 for a, b in shapes]
    biases = [setting.random(networks, b) for _, b in shapes]
    x = setting.random(batch, widths[0])
    plan = lipfast.compile(perceptron(widths), torch.zeros(2, widths[0]))
    state_dicts = [
        {f"{2 * i}.{kind}": of[i][n] for i in range(len(shapes)) for kind, of in
         (("weight", weights), ("bias", biases))}
        for n in range(networks)
    ]  # fmt: skip
    part = max(1, networks // 100)  # explicit Jacobians in parts that fit

    def explicit(reduce: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            lower = [
                reduce(
                    explicit_jacobians(
                        x, [w[i : i + part] for w in weights], [b[i : i + part] for b in biases]
                    ).flatten(0, 1)
                )
                for i in range(0, networks, part)
            ]
            return lower, [power_iteration(w) for w in weights]

        return run

    host = [{k: v.cpu() for k, v in s.items()} for s in state_dicts[::part]]
    host_x = x.cpu()
    return Case(
        f"{networks} checkpoints of {'-'.join(map(str, widths))}, {batch} samples, both bounds",
        lambda: plan.bounds(state_dicts, x),
        {
            "products, eigvalsh; power iteration": explicit(gram_norms),
            "products, power iterations": explicit(power_norms),
            "products, power iterations, TF32": in_tf32(explicit(power_norms)),
        },
        (lambda: plan.bounds(host, host_x), len(host) / networks),
    )


def quadratic_case(setting: Setting, networks: int, widths: Sequence[int]) -> Case:
    """Tight upper bounds of perceptrons; torch has none, so beside the product of their norms."""
    models = [perceptron(widths).to(setting.device) for _ in range(min(networks, 10))]
    state_dicts = [dict(models[i % len(models)].state_dict()) for i in range(networks)]
    plan = lipfast.compile(models[0], setting.random(2, widths[0]))
    host = [{k: v.cpu() for k, v in s.items()} for s in state_dicts[: len(models)]]
    return Case(
        f"{networks} upper bounds of {'-'.join(map(str, widths))}, quadratic constraints",
        lambda: plan.upper(state_dicts, method="quadratic", effort=1),
        {"lipfast, product of norms": lambda: plan.upper(state_dicts)},
        (lambda: plan.upper(host, method="quadratic", effort=1), len(host) / networks),
    )


def network_case(setting: Setting, batch: int, widths: Sequence[int]) -> Case:
    """Jacobian norms of one perceptron."""
    model = perceptron(widths).to(setting.device)
    x = setting.random(batch, widths[0])
    linear = [module for module in model if isinstance(module, nn.Linear)]
    weights = [module.weight[None] for module in linear]
    biases = [module.bias[None] for module in linear]
    parts = torch.split(x, max(1, batch // 10))

    def products() -> object:
        return [power_norms(explicit_jacobians(part, weights, biases)[0]) for part in parts]

    host, host_x = perceptron(widths), x[:: max(1, batch // 500)].cpu()
    return Case(
        f"Jacobian norms of {'-'.join(map(str, widths))}, {batch} samples",
        lambda: lipfast.jacobian_norms(model, x),
        {
            "vmap(jacrev), eigvalsh": lambda: vmap_jacobian_norms(model, x, chunk=1024),
            "products, power iterations": products,
            "products, power iterations, TF32": in_tf32(products),
            "products, CUDA graph": captured(products, setting.device),
        },
        (lambda: lipfast.jacobian_norms(host, host_x), len(host_x) / batch),
    )


def convolutions_case(setting: Setting, layers: Sequence[tuple[int, int, int]]) -> Case:
    """Certified norms of 3 x 3 convolutions: channels in, out, and the input's size."""
    kernels = [
        (setting.random(out, channels, 3, 3) / (9 * channels) ** 0.5, size)
        for channels, out, size in layers
    ]
    host = [kernel.cpu() for kernel, _ in kernels]

    sizes = [(size, size) for _, size in kernels]

    def ours(of: Sequence[Tensor]) -> object:
        return lipfast.conv_norms(of, input_sizes=sizes, padding=1)

    return Case(
        f"{len(layers)} convolutions up to {max(out for _, out, _ in layers)} channels, certified",
        lambda: ours([kernel for kernel, _ in kernels]),
        {"svdvals of the symbols": lambda: [fft_conv_norm(w, n) for w, n in kernels]},
        (lambda: ours(host), 1.0),
    )


# ResNet-18 on inputs of 32 x 32 (its stem without stride), each shape of its 3 x 3 layers once.
RESNET18 = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)]
RESNET18 += [(256, 512, 4), (512, 512, 4)]


def cases(setting: Setting) -> Iterator[Case]:
    """What is compared, one after the other: each holds its inputs only while it is timed."""
    sized, random = setting.sized, setting.random
    count = sized(10_000, 4)
    triple = [(40, 256), (256, 256), (256, 10)]
    stacks = [random(count, b, a) for a, b in triple]
    yield spectral_case(f"spectral norms of {count} triples", stacks, certify=True)
    yield spectral_case(f"spectral norms of {count} triples", stacks, certify=False)
    del stacks
    widths = (40, 256, 256, 10)
    yield checkpoints_case(setting, sized(5000, 3), sized(1000, 5), widths)
    yield quadratic_case(setting, sized(1000, 3), widths)
    yield convolutions_case(setting, RESNET18 if not setting.tiny else [(3, 4, 6), (4, 4, 6)])
    for n, side in ((16, sized(512, 24)), (1, sized(4096, 24))):
        matrices = [random(n, side, side)]
        yield spectral_case(f"spectral norms of {n} x {side}^2", matrices, certify=True)
        yield spectral_case(f"spectral norms of {n} x {side}^2", matrices, certify=False)
    yield network_case(setting, sized(4000, 4), (784, sized(1024, 16), sized(1024, 16), 10))
    yield network_case(setting, sized(60_000, 4), (784, sized(256, 16), 10))


def show(case: Case, setting: Setting) -> None:
    """Print the block of a case; what fails says so in its line, and the others go on."""
    print(case.name)
    ours = _timed("lipfast", case.ours, setting.device, None)
    for name, call in case.others.items():
        _timed(name, call, setting.device, ours)
    if case.cpu is not None:
        call, part = case.cpu
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            named = "lipfast on 2 CPU threads" + ("" if part == 1 else f" ({part:.2%}, scaled)")
            _timed(named, call, torch.device("cpu"), ours, scale=1 / part)
        finally:
            torch.set_num_threads(before)


def _timed(
    name: str,
    call: Callable[[], object],
    device: torch.device,
    ours: float | None,
    scale: float = 1.0,
) -> float | None:
    try:
        taken = scale * milliseconds(call, device)
    except (RuntimeError, lipfast.LipfastError) as error:  # out of memory, above all
        print(f"    {name:48} {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    ratio = "" if ours is None else f"  x {taken / ours:.2f}"
    print(f"    {name:48} {taken:12.3f} ms{ratio}", flush=True)
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    given = parser.parse_args(arguments)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --tiny shows that this runs")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if given.device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}")
    setting = Setting(given.device, given.tiny)
    for case in cases(setting):
        show(case, setting)


if __name__ == "__main__":
    main()
