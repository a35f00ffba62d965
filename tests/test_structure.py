"""The shape of the repository: imports go one way, files are short, words stand for one thing."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.structure import (
    PACKAGES,
    ROOT,
    body_lines,
    circle,
    defined_names,
    first_lines,
    functions,
    imports,
    imports_without_reason,
    modules,
    public_names,
)

# Part of lipfast -> what it may import beside itself, in functions and for types as well: only what
# stands above it in this table. A module belongs to the longest name here that it starts with;
# whoever may import a part may import those inside it.
BELOW = {
    "errors": "",
    "_version": "",
    "_clock": "",
    "text": "",
    "norms": "errors",
    "_native": "errors _version _C _C_cuda",
    "_info": "_native _version",
    "rounding": "",
    "ops": "errors norms rounding _clock _native",
    "reference": "ops",
    "graph": "errors",
    "rules": "errors norms rounding ops graph",
    "plan": "errors text norms rounding ops graph rules",
    "estimators": "errors text norms rounding _clock ops graph rules plan",
    "checkpoints": "errors text",
    "scoring": "errors text norms _version _clock _native plan estimators checkpoints",
    "__init__": "errors _version _info ops rules estimators scoring",
    "cli": "errors text norms _version _info estimators checkpoints scoring __init__",
    "__main__": "cli",
}
EXTENSIONS = ("_C", "_C_cuda")
PACKAGES_BELOW = {"lipfast": "", "experiments": "lipfast", "bench": "lipfast experiments"}
LONGEST_FILE = 450
LONGEST_BODY = 60
# A first line stands alone, where a tool shows nothing else.
OPENINGS = ("The same", "Of a ", "Of an ", "Of the ", "That of ", "As ")
# Equal names of two modules, beside those of `means_the_same`: name -> why.
EQUAL_NAMES: dict[str, str] = {}


def part_of(module: str) -> str:
    """The part of lipfast that a module belongs to."""
    name = module.removeprefix("lipfast").removeprefix(".") or "__init__"
    parts = [part for part in BELOW if name == part or name.startswith(f"{part}.")]
    return max(parts, key=len, default=name)


def may_import(part: str, target: str) -> bool:
    allowed = {part, *BELOW[part].split()}
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def test_the_table_goes_one_way() -> None:
    known = set(EXTENSIONS)
    for part, below in BELOW.items():
        assert set(below.split()) <= known, f"{part}: may import what is not above it in the table"
        known.add(part)
    used = {part_of(name) for name in modules() if name.split(".")[0] == "lipfast"}
    assert set(BELOW) <= used, "a part of the table is no more"


def test_parts_import_what_is_below_them() -> None:
    found = []
    for name, module in modules().items():
        if name.split(".")[0] != "lipfast":
            continue
        part = part_of(name)
        if part not in BELOW:
            found.append(f"{name}: a new part; say in this test what it may import")
            continue
        found += [
            f"{module.at(i.line)}: {part} imports {part_of(i.target)} ({i.target})"
            for i in imports(name)
            if i.target.split(".")[0] == "lipfast" and not may_import(part, part_of(i.target))
        ]
    assert not found, "\n".join(found)


def test_packages_import_what_is_below_them() -> None:
    found = []
    for name, module in modules().items():
        package = name.split(".")[0]
        allowed = {package, *PACKAGES_BELOW[package].split()}
        found += [
            f"{module.at(i.line)}: {package} imports {i.target}"
            for i in imports(name)
            if i.target.split(".")[0] not in allowed
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_files(package: str) -> None:
    found = circle(package)
    assert found is None, f"files import each other in a circle:\n{found}"


def test_imports_inside_functions_say_why() -> None:
    """Optional dependencies and start-up time; a circle is no reason."""
    found = list(imports_without_reason())
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    lengths = {
        module.at(length): length
        for name, module in modules().items()
        if name.split(".")[0] == "lipfast"
        and (length := len(module.text.splitlines())) > LONGEST_FILE
    }
    assert not lengths, "\n".join(lengths)


def test_functions_fit_on_a_screen() -> None:
    found = [
        f"{module.at(function.lineno)}: {function.name}, {body_lines(function)} lines"
        for module in modules().values()
        for function in functions(module)
        if body_lines(function) > LONGEST_BODY
    ]
    assert not found, "\n".join(found)


def test_first_lines_of_docstrings_stand_alone() -> None:
    found = [
        f"{module.at(line)}: {text}"
        for module in modules().values()
        for line, text in first_lines(module)
        if text.startswith(OPENINGS)
    ]
    assert not found, "\n".join(found)


def means_the_same(name: str, places: set[str]) -> bool:
    """What the reference says again, as it is independent; a command and what it calls."""
    parts = sorted(part_of(place) for place in places)
    if len(parts) != 2:
        return False
    return "reference" in parts or ("cli" in parts and name in public_names())


def test_a_name_stands_for_one_thing() -> None:
    places = defaultdict(set)
    for module, content in modules().items():
        if module.split(".")[0] == "lipfast":
            for name in defined_names(content):
                places[name].add(module)
    equal = {name: where for name, where in places.items() if len(where) > 1}
    assert set(EQUAL_NAMES) <= set(equal), "a name of EQUAL_NAMES stands in one module only"
    found = [
        f"{name}: {', '.join(sorted(where))}"
        for name, where in sorted(equal.items())
        if name not in EQUAL_NAMES and not means_the_same(name, where)
    ]
    assert not found, "\n".join(found)


STEMS = (
    "spectral_norms",
    "conv_norms",
    "jacobian_reduction",
    "chain_jacobian_norms",
    "chain_secants",
    "chain_interval_jacobian",
)


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


CPU_ONLY = ("conv_norms", "chain_interval_jacobian")


@pytest.mark.parametrize("stem", CPU_ONLY)
def test_ops_for_the_cpu_only_are_named_here(stem: str) -> None:
    assert stem in STEMS
    assert not (ROOT / f"csrc/ops/cuda/{stem}.cpp").exists()


@pytest.mark.parametrize(
    "stem",
    [
        *(stem for stem in STEMS if stem not in CPU_ONLY),
        *("cholesky_bounds", "hermitian_residual", "shifted_grams", "symbol_grams", "tap_products"),
    ],
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
