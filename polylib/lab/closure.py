"""Which modules of polylib a piece of code reaches by its imports, and the digest of their files.

Kept outputs and stored results depend on this closure and not on the whole package: an edit in one part leaves the
results of the others valid. Files are read and not imported, so that the answer doesn't depend on what happens to be
loaded. Where an import can't be followed for certain, as in `importlib.import_module(name)`, the whole package counts.

An `__init__` of polylib only lists names. Of the modules that it lists those count whose names are used, so that a list
of imports counts for nothing itself: another name in it leaves what does not use it valid. Other code in it counts.
"""

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from polylib._lazy import names_of

PACKAGE = "polylib"
ROOT = Path(__file__).resolve().parent.parent
DYNAMIC = {"import_module", "__import__"}
READERS = {f"{PACKAGE}.lab.code_reading"}  # what it imports by name, it has found in the reader's own code


def _file(module: str) -> Path | None:
    """The source file of a module of polylib, or None if there is no such module."""
    path = ROOT.joinpath(*module.split(".")[1:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def everything() -> frozenset[str]:
    """Every module of polylib."""
    names = (".".join([PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]) for path in ROOT.rglob("*.py"))
    return frozenset(name.removesuffix(".__init__") for name in names)


def _homes(package: str) -> dict[str, str]:
    """The names that a package lists, each with the module that holds it. Empty for a module."""
    file = _file(package)
    if file is None or file.name != "__init__.py":
        return {}
    stub = file.with_suffix(".pyi")
    if stub.is_file():
        return {name: f"{package}.{home}" for name, home in names_of(stub).items()}
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return {
        alias.asname or alias.name: node.module or ""
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
    }


def _target(module: str, name: str) -> set[str]:
    """The modules that `from module import name` needs."""
    homes = _homes(module)
    if name == "*":
        return {module, *homes.values()}
    if name in homes:
        return {module, homes[name]}
    if _file(f"{module}.{name}"):
        return {f"{module}.{name}"}
    return {module} if _file(module) else set()


def _parts(node: ast.AST) -> list[str]:
    """A dotted name as its parts, `polylib.lab.train` as three; else empty."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _of_import_from(node: ast.ImportFrom, package: str) -> str:
    """The absolute name of the module that a `from` import names."""
    if not node.level:
        return node.module or ""
    above = package.split(".")
    return ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])


def _follow(parts: list[str], module: str) -> set[str]:
    """The modules behind the names that are taken from a module. A package that is handed on whole counts whole."""
    found: set[str] = set()
    for name in parts:
        found |= _target(module, name)
        module = f"{module}.{name}"
        if not _file(module):
            return found
    return found | {name for name in everything() if f"{name}.".startswith(f"{module}.")}


def _imports(tree: ast.AST, package: str, dynamic: bool = True) -> set[str]:
    """The modules of polylib that the code imports, directly or through an attribute of an imported package.

    If it imports by names that only the run knows, all modules; with `dynamic=False` these are none of polylib's.
    """
    found: set[str] = set()
    bound: dict[str, str] = {}  # a local name, and the module that it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    found.add(alias.name)
                    bound[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
        elif isinstance(node, ast.ImportFrom):
            base = _of_import_from(node, package)
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    found |= _target(base, alias.name)
                    module = f"{base}.{alias.name}"
                    if _homes(module) or (_file(module) and alias.name not in _homes(base)):
                        bound[alias.asname or alias.name] = module
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) in inner:
            continue
        first, *rest = _parts(node) or [""]
        if dynamic and DYNAMIC.intersection([first, *rest]):
            return set(everything())
        if first in bound:
            found |= _follow(rest, bound[first])
    # Importing a module runs the packages above it.
    return {".".join(name.split(".")[:n]) for name in found for n in range(1, name.count(".") + 2)}


@functools.lru_cache(maxsize=1024)
def _imports_of_file(module: str, modified: int) -> frozenset[str]:
    file = _file(module)
    if file is None or module == f"{PACKAGE}._lazy":
        return frozenset()
    if file.name == "__init__.py":
        return frozenset([f"{PACKAGE}._lazy"])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return frozenset(_imports(tree, module.rpartition(".")[0], dynamic=module not in READERS))


def of_modules(modules: Iterable[str]) -> frozenset[str]:
    """The modules of polylib that the given ones reach, themselves included. Other names are passed over."""
    reached: set[str] = set()
    waiting = [name for name in modules if name.split(".")[0] == PACKAGE]
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if module in reached or file is None:
            continue
        reached.add(module)
        waiting += _imports_of_file(module, file.stat().st_mtime_ns)
    return frozenset(reached)


def of_source(source: str) -> frozenset[str]:
    """The modules of polylib that Python code reaches. Code that does not parse reaches all of them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return everything()
    return of_modules(_imports(tree, "__main__"))


def code_only(source: str) -> str:
    """A module's lines without blank lines, lines of comment and docstrings."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)  # type: ignore[operator]
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _only_lists(node: ast.stmt) -> bool:
    """Whether a statement of an `__init__` is its docstring, an import from its package, or `__all__`."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith(f"{PACKAGE}.") and node.module != f"{PACKAGE}._lazy"
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@functools.lru_cache(maxsize=1024)
def _content(file: Path, modified: int, comments: bool) -> bytes:
    content = file.read_bytes()
    if file.name == "__init__.py" and all(map(_only_lists, ast.parse(content).body)):
        return b""
    return content if comments else code_only(content.decode()).encode()


def digest(modules: Iterable[str], text: str = "", *, comments: bool = True) -> str:
    """SHA-256 of a text and of the names and files of modules, or of their code without comments and docstrings."""
    total = hashlib.sha256(text.encode())
    for module in sorted(set(modules)):
        file = _file(module)
        total.update(f"\0{module}\0".encode())
        total.update(_content(file, file.stat().st_mtime_ns, comments) if file else b"missing")
    return total.hexdigest()
