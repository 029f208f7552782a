"""The import rules of the package, read from its source code: layers, no circles, no imports hidden in functions."""

from __future__ import annotations

import ast
import graphlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "resdet"
GROUND = ("types", "errors", "files", "yaml12", "precision", "random_states")

NEVER: Mapping[str, tuple[str, ...]] = {
    "weights": ("models", "plan", "data", "check", "training", "evaluation", "classification", "config", "build"),
    "models": (
        "plan",
        "config",
        "build",
        "data",
        "check",
        "training",
        "evaluation",
        "export",
        "classification",
        "prediction",
    ),
    "data": ("plan", "evaluation", "prediction", "training", "config", "build"),
    "evaluation": ("plan", "training", "config", "build"),
    "check": ("plan", "training", "evaluation", "config", "build"),
    **dict.fromkeys(GROUND, ("models", "weights", "data", "check", "training", "evaluation", "export", "config")),
}
"""What a part of the package imports neither itself nor through other modules."""

EXCEPT: Mapping[str, tuple[str, ...]] = {"weights": ("models.archs", "models.spec")}
"""Modules of a forbidden part that are allowed all the same."""

OPTIONAL = (
    "supervision",
    "albumentations",
    "onnx",
    "onnxruntime",
    "openvino",
    "onnxscript",
    "matplotlib",
    "sklearn",
    "torch.utils.tensorboard",
    "resdet.models.epilogue_kernels",  # imports triton
    "resdet.models.suppression_kernels",  # likewise
)
"""Slow packages that not every run needs: only these are imported inside functions."""

PLATFORM = ("fcntl", "resource")
"""Modules of the standard library that some systems lack."""

COMMANDS = f"{PACKAGE}.commands"
"""Commands import what is slow inside ``main``, so that ``--help`` is quick."""


@dataclass(frozen=True)
class Import:
    """One import statement's module.

    Attributes:
        importer: Dotted name of the module that imports.
        imported: Dotted name of the module that is imported.
        place: ``path:line``.
        in_function: Whether it happens when a function is called.
    """

    importer: str
    imported: str
    place: str
    in_function: bool


def broken_rules(root: Path) -> list[str]:
    """Return every breach of the rules in the package below ``root``, one line each."""
    imports = list(read_imports(root))
    modules = _modules(root)
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for one in imports:
        if one.imported in graph:
            graph[one.importer] |= {one.imported, *_packages_around(one)} & graph.keys()
    return [*_forbidden(graph, packages), *_circles(graph), *_hidden(imports), *_of_the_top(imports)]


def read_imports(root: Path) -> Iterator[Import]:
    """Yield all imports in the package below ``root``: at the top, in functions and under ``TYPE_CHECKING``."""
    modules = _modules(root)
    for importer, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            for imported in _imported(node, modules):
                place = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                yield Import(importer, imported, place, node in inside)


def _modules(root: Path) -> dict[str, Path]:
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _imported(node: ast.AST, modules: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        names = [f"{base}.{alias.name}" for alias in node.names]
        return sorted({name if name in modules else base for name in names})
    return []


def _packages_around(one: Import) -> set[str]:
    """Return the packages whose ``__init__.py`` an import runs too; a module's own and the top one aside."""
    parts = one.imported.split(".")
    packages = {".".join(parts[:end]) for end in range(2, len(parts))}
    return {package for package in packages if not f"{one.importer}.".startswith(f"{package}.")}


def _part(module: str) -> str:
    return f"{module}.".split(".")[1]


def _is_below(module: str, names: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{PACKAGE}.{name}.") for name in names)


def _forbidden(graph: Mapping[str, set[str]], packages: set[str]) -> Iterator[str]:
    for module in graph:
        allowed = EXCEPT.get(_part(module), ())
        seen: dict[str, list[str]] = {module: [module]}
        queue = deque([module])
        while queue:
            here = queue.popleft()
            for target in sorted(graph[here] - set(seen)):
                seen[target] = [*seen[here], target]
                if _is_below(target, allowed):
                    continue
                # What stands in a package's __init__.py counts, not the package itself.
                if target not in packages and _is_below(target, NEVER.get(_part(module), ())):
                    yield f"forbidden import: {' -> '.join(seen[target])}"
                else:
                    queue.append(target)


def _circles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    rest = {module: set(targets) for module, targets in graph.items()}
    while True:
        try:
            graphlib.TopologicalSorter(rest).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][:0:-1]  # each imports the next
            first = circle.index(min(circle))
            circle = [*circle[first:], *circle[: first + 1]]
            yield f"import circle: {' -> '.join(circle)}"
            rest[circle[0]].discard(circle[1])  # look for others
        else:
            return


def _hidden(imports: list[Import]) -> Iterator[str]:
    for one in imports:
        names = [one.imported.startswith(name) for name in (*OPTIONAL, *PLATFORM)]
        if one.in_function and not any(names) and not one.importer.startswith(COMMANDS):
            yield f"import inside a function: {one.place}: {one.imported}"


def _of_the_top(imports: list[Import]) -> Iterator[str]:
    for one in imports:
        if one.imported == PACKAGE:
            yield f"import of {PACKAGE}/__init__.py: {one.place}"
