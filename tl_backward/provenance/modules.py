"""Identifying Python modules: those of packages by version, all others by their sources."""

from __future__ import annotations

import sys
import sysconfig
import zlib
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

PACKAGES = ("torch", "transformer-lens", "transformers")


def versions() -> dict[str, str]:
    """The versions that all results depend on."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = {name: version(name).partition("+")[0] for name in PACKAGES}
    return {"Python": python, "tl-backward": _own_version(), **packages}


def is_own(module: str | None) -> bool:
    """Whether a module belongs to this package."""
    return _package(module) == _package(__name__)


@cache
def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or a package, and is identified by name and version.

    This package counts as installed wherever it is: its version includes a source checksum.
    """
    if _package(module) in sys.builtin_module_names or is_own(module):
        return True
    file = getattr(sys.modules.get(_package(module)), "__file__", None)
    if file is None or module == "__main__":  # an installed program such as pdb may run it
        return False
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    folders = set(Path(file).parents)
    in_packages = {"site-packages", "dist-packages"} & {folder.name for folder in folders}
    return bool(in_packages or libraries & folders)


def known_module(module: ModuleType) -> dict[str, str]:
    """Identify a module by its package's version, or by its sources and those of its imports."""
    if is_installed(module.__name__):
        package = sys.modules[_package(module.__name__)]
        return {module.__name__: str(getattr(package, "__version__", None)).partition("+")[0]}
    sources: dict[str, str] = {}
    todo = [module]
    while todo:
        one = todo.pop()
        file = getattr(one, "__file__", None)
        if one.__name__ in sources or file is None or is_installed(one.__name__):
            continue
        sources[one.__name__] = sha256(Path(file).read_bytes()).hexdigest()
        for value in vars(one).values():
            name = getattr(value, "__module__", None)
            origin = sys.modules.get(name) if isinstance(name, str) else None
            todo += [found for found in (value, origin) if isinstance(found, ModuleType)]
    return sources


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@cache
def _own_version() -> str:
    """The version and a checksum of the sources, because the version changes only at releases."""
    try:
        number = version("tl-backward")
    except PackageNotFoundError:
        number = "not installed"
    package = Path(__file__).parents[1]
    sources = b"".join(file.read_bytes() for file in sorted(package.rglob("*.py")))
    return f"{number}, sources {zlib.crc32(sources):08x}"
