"""What the files of the packages are: their imports, names, docstrings and lengths."""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("lipfast", "experiments", "bench")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Import:
    """One imported module of this repository; `lipfast._C` is one, packages are their __init__."""

    target: str
    line: int


@dataclass(frozen=True)
class Module:
    """A file of one of the packages."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


@cache
def modules() -> dict[str, Module]:
    """Dotted name -> module, for all files of the packages."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        found[name] = Module(name, path, text, ast.parse(text))
    return found


@cache
def public_names() -> Mapping[str, str]:
    """Where the names stand that `lipfast` imports when they are first used."""
    homes: dict[str, str] = {}
    seen_by_type_checkers: dict[str, str] = {}
    for node in modules()["lipfast"].tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            for home, names in ast.literal_eval(node.value).items():
                homes |= dict.fromkeys(names.split(), home)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                seen_by_type_checkers |= {alias.name: str(line.module) for alias in line.names}
    assert homes, "lipfast/__init__.py has no _HOME"
    assert homes == seen_by_type_checkers, "lipfast/__init__.py: _HOME and the imports differ"
    return homes


@cache
def _exports(package: str) -> frozenset[str]:
    """Names that a package's ``__init__`` takes from elsewhere or defines."""
    if package not in modules():
        return frozenset()
    found = defined_names(modules()[package])
    for node in modules()[package].tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != package:
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def _target(source: str, name: str) -> str:
    """The module that ``from source import name`` is about."""
    whole = f"{source}.{name}"
    if name not in _exports(source) and (whole in modules() or name in ("_C", "_C_cuda")):
        return whole
    return public_names().get(name, source) if source == "lipfast" else source


@cache
def imports(module: str) -> tuple[Import, ...]:
    """All of them: at the top, inside functions, and for types only."""
    found = []
    for node in ast.walk(modules()[module].tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{modules()[module].at(node.lineno)}: a relative import"
            source = node.module or ""
            targets = [_target(source, name) for name in targets]
        found += [Import(t, node.lineno) for t in targets if t.split(".")[0] in PACKAGES]
    return tuple(dict.fromkeys(found))


def circle(package: str) -> str | None:
    """A shortest circle of imports in a package, one step a line, or None."""
    edges = {
        name: {i.target: i.line for i in imports(name) if i.target in modules()}
        for name in modules()
        if name.split(".")[0] == package
    }
    circles = [path for name in edges if (path := _way_back(name, edges))]
    if not circles:
        return None
    shortest = min(circles, key=len)
    steps = zip(shortest, [*shortest[1:], shortest[0]], strict=True)
    lines = [f"{modules()[a].at(edges[a][b])} imports {b}" for a, b in steps]
    files = sorted({name for path in circles for name in path})
    return "\n".join([*lines, f"in circles, with their shortest: {', '.join(files)}"])


def _way_back(start: str, edges: Mapping[str, Mapping[str, int]]) -> list[str] | None:
    """A shortest way along imports from a module to itself."""
    before: dict[str, str] = {}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for target in edges.get(at, {}):
            if target == start:
                path = [at]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            if target not in before:
                before[target] = at
                queue.append(target)
    return None


def imports_without_reason() -> Iterator[str]:
    """Imports inside functions whose line gives no reason beside ``# noqa: PLC0415``."""
    for module in modules().values():
        lines = module.text.splitlines()
        for function, node in _inside_functions(module.tree):
            comment = lines[node.lineno - 1].partition("#")[2]
            if not re.search(r"[a-z]{2}", re.sub(r"noqa: [A-Z0-9, ]+", "", comment)):
                yield f"{module.at(node.lineno)} in {function}: {lines[node.lineno - 1].strip()}"


def _inside_functions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    seen = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in seen:
                seen.add(node)
                yield function.name, node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def first_lines(module: Module) -> Iterator[tuple[int, str]]:
    """Line numbers and first lines of all docstrings."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | Definition):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring.splitlines()[0]


def defined_names(module: Module) -> set[str]:
    """What a module defines at its top level, without names such as ``__all__``."""
    found: set[str] = set()
    for node in module.tree.body:
        if isinstance(node, Definition):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("__")}
