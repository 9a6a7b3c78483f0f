"""Imports point downward only, and ctypes stays in ``kernel``: the layout of docs/design.md as a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kagemusha

ROOT = Path(kagemusha.__file__).parent
BASE = {"errors", "model"}
STAGE = {*BASE, "protocol", "wire", "kernel"}
NETWORK_STAGE = {*STAGE, "transport"}
AGENT = {*NETWORK_STAGE, "failover", "guest", "capture", "ship", "commit", "gate", "inbound", "switching"}
TOP = {*AGENT, "agents"}

# What each package may import besides itself. A new package has to be entered here.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "model": {"errors"},
    "protocol": BASE,
    "wire": BASE,
    "kernel": BASE,
    "transport": {*BASE, "wire"},
    "guest": STAGE,
    "capture": STAGE,
    "ship": NETWORK_STAGE,
    "commit": NETWORK_STAGE,
    "gate": STAGE,
    "failover": NETWORK_STAGE,
    "inbound": NETWORK_STAGE,
    "switching": NETWORK_STAGE,
    "agents": AGENT,
    "demo": {*TOP, "cli"},
    "bench": {*TOP, "cli", "demo", "chaos"},
    "chaos": {*TOP, "demo"},
    "switch_demo": {*TOP, "demo", "bench", "chaos"},
    "cli": {*TOP, "demo", "bench", "chaos", "switch_demo"},
    "guest_tools": set(),  # copied into guests: the standard library alone
}
PURE = ("protocol", "model")
COMMAND_IN_PROTOCOL = ROOT / "protocol" / "simulate" / "__main__.py"  # hands randomness and time to the simulation
IMPURE_MODULES = {
    "asyncio",
    "logging",
    "random",
    "secrets",
    "select",
    "socket",
    "subprocess",
    "threading",
    "time",
}

MODULES = sorted(path for path in ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    """First part of the path below ``kagemusha``: a package, or a single module such as ``errors``."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that a module imports, wherever in it, also below ``if TYPE_CHECKING``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports_of(path: Path) -> list[str]:
    return list(imported(ast.parse(path.read_text(), str(path))))


def forbidden_imports(package: str, names: list[str]) -> list[str]:
    """The imports that lead out of ``package`` to where it must not look."""
    allowed = {package, *ALLOWED[package]}
    ours = (name.split(".") for name in names if name.startswith("kagemusha."))
    return [".".join(parts) for parts in ours if parts[1] not in allowed and parts[1] != "__version__"]


def test_modules_are_found() -> None:
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        assert not [name for name in imports_of(path) if name.startswith("kagemusha")]
        return
    assert package in ALLOWED, f"{package} is not in the layout; enter what it may import"
    assert forbidden_imports(package, imports_of(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_kernel_uses_ctypes(path: Path) -> None:
    if package_of(path) != "kernel":
        assert [name for name in imports_of(path) if name.split(".")[0] in ("ctypes", "cffi", "_ctypes")] == []


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if package_of(path) in PURE and path != COMMAND_IN_PROTOCOL],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pure_packages_do_no_io(path: Path) -> None:
    assert [name for name in imports_of(path) if name.split(".")[0] in IMPURE_MODULES] == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("protocol", "from kagemusha.kernel import uffd"),
        ("protocol", "import kagemusha.guest.qmp"),
        ("wire", "from kagemusha.protocol import primary"),
        ("kernel", "from kagemusha.guest.qmp import QmpSession"),
        ("capture", "def later() -> None:\n    from kagemusha.guest import qmp"),
        ("gate", "from kagemusha import ship"),
        ("agents", "from kagemusha.cli import main"),
        ("model", "from kagemusha.wire import frame"),
    ],
)
def test_upward_import_is_found(package: str, line: str) -> None:
    assert forbidden_imports(package, list(imported(ast.parse(line))))


def test_third_party_imports_are_declared() -> None:
    """Everything imported is the standard library's or in ``pyproject.toml``."""
    declared = {
        "httpx",
        "lz4",
        "numpy",
        "pcapy",
        "pydantic",
        "pyroute2",
        "rich",
        "typer",
        "xxhash",
        "zstandard",
        "redis",
        "matplotlib",
    }
    used = {name.split(".")[0] for path in MODULES for name in imports_of(path)}
    assert used - set(sys.stdlib_module_names) - {"kagemusha"} <= declared
