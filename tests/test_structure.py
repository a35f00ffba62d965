"""The shape of the repository: imports go one way, every op has its stem everywhere."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A part may import itself and what stands below it. `plan.plan` is the public face of estimators
# and imports them inside its methods; imports inside functions are not looked at.
BELOW = {
    "errors": set(),
    "_version": set(),
    "_clock": set(),
    "text": set(),
    "_native": {"errors", "_version"},
    "_info": {"_native", "_version"},
    "reference": {"errors", "ops"},
    "ops": {"errors", "_clock", "_native"},
    "rules": {"errors", "ops", "plan"},
    "plan": {"errors", "ops", "rules"},
    "estimators": {"errors", "_clock", "ops", "rules", "plan"},
    "checkpoints": {"errors", "text"},
    "scoring": {
        "errors",
        "_version",
        "_clock",
        "text",
        "_native",
        "plan",
        "rules",
        "estimators",
        "checkpoints",
    },
    "cli": {"errors", "_version", "text", "scoring", "_info"},
    "__main__": {"cli"},
}
STEMS = (
    "spectral_norms",
    "conv_norms",
    "jacobian_reduction",
    "chain_jacobian_norms",
    "chain_secants",
)


def imported_parts(path: Path) -> set[str]:
    """Parts of lipfast that a file imports when it is imported (not under TYPE_CHECKING)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = node.module == "lipfast"
            names = [f"lipfast.{alias.name}" for alias in node.names] if whole else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("lipfast.")}
    return found


def files() -> list[Path]:
    return sorted(path for path in (ROOT / "lipfast").rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT / "lipfast").parts[0].removesuffix(".py")
    assert part in BELOW, f"new part {part}: say in this test what it may import"
    assert imported_parts(path) - {part, "_C"} <= BELOW[part]


def test_the_package_never_imports_experiments_or_bench() -> None:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            names = [
                alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)
            ]
            assert not {"experiments", "bench"} & {name.split(".")[0] for name in [module, *names]}


@pytest.mark.parametrize("stem", STEMS)
def test_an_op_has_one_stem_everywhere(stem: str) -> None:
    expected = [
        f"csrc/kernels/cpu/{stem}.h",
        f"csrc/kernels/cpu/{stem}-inl.h",
        f"csrc/kernels/cpu/{stem}.cpp",
        f"csrc/ops/{stem}.cpp",
        f"csrc/ops/cpu/{stem}.cpp",
        f"lipfast/ops/{stem}.py",
        f"lipfast/reference/{stem}.py",
        f"tests/ops/test_{stem}.py",
        f"bench/bench_{stem}.py",
    ]
    assert [path for path in expected if not (ROOT / path).is_file()] == []


CPU_ONLY = ("conv_norms", "chain_secants")


@pytest.mark.parametrize("stem", CPU_ONLY)
def test_ops_for_the_cpu_only_are_named_here(stem: str) -> None:
    assert stem in STEMS
    assert not (ROOT / f"csrc/ops/cuda/{stem}.cpp").exists()


@pytest.mark.parametrize(
    "stem", [*(stem for stem in STEMS if stem not in CPU_ONLY), "cholesky_residual"]
)
def test_an_op_has_one_stem_on_cuda(stem: str) -> None:
    expected = [
        *(f"csrc/kernels/cuda/{stem}.{kind}" for kind in ("h", "cuh", "cu")),
        f"csrc/ops/{stem}.cpp",
        f"csrc/ops/cuda/{stem}.cpp",
        f"lipfast/ops/{stem}.py",
        f"lipfast/reference/{stem}.py",
        f"tests/csrc/case_{stem}.h",
        f"tests/ops/test_{stem}.py",
    ]
    assert [path for path in expected if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc/kernels").rglob("*.[hc]*")), ids=lambda path: path.name
)
def test_kernels_know_nothing_of_torch(path: Path) -> None:
    assert "torch/" not in path.read_text()


def test_no_path_of_a_machine_is_tracked() -> None:
    patterns = ["/ho" + "me/", "/ro" + "ot/", "/Us" + "ers/"]
    command = ["git", "grep", "-nIF", *[part for pattern in patterns for part in ("-e", pattern)]]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip(f"not a git checkout: {found.stderr.strip()}")
    assert found.stdout == ""
