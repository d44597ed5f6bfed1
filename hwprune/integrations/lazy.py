"""Register with timm, diffusers and transformers when they are imported, whoever does, importing none.

Until then one finder for each waits at the front of `sys.meta_path`. It wraps the loading of one module
alone, and is gone once that has run. Where the package is never imported, or absent, nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_lock = threading.Lock()


def _register_timm() -> None:
    from hwprune.integrations.timm_registry import register

    register()


def _register_diffusers() -> None:
    from hwprune.integrations.diffusers_models import register

    register()


def _register_transformers() -> None:
    from hwprune.integrations.transformers_models import register

    register()


# The module after which a package can be registered with, and how.
_HOOKS: tuple[tuple[str, Callable[[], None]], ...] = (
    ("timm.models", _register_timm),
    ("diffusers.models.modeling_utils", _register_diffusers),
    ("transformers.quantizers.auto", _register_transformers),
)


def install() -> None:
    """Register with each package: now if it is imported, else right after it is.

    Safe to call again, from several threads, with a package absent, and while it is being imported.
    """
    for watched, register in _HOOKS:
        _install(watched, register)


def _install(watched: str, register: Callable[[], None]) -> None:
    if watched in sys.modules and not _ready(watched):
        importlib.import_module(
            watched
        )  # waits where another thread is at it; else returns at once
    with _lock:
        if not _ready(watched):
            if not any(_waits_for(finder, watched) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder(watched, register))
            return
    _register(watched, register)


def _ready(watched: str) -> bool:
    """Whether the module has run to its end."""
    module = sys.modules.get(watched)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _register(watched: str, register: Callable[[], None]) -> None:
    try:
        register()
    except (
        Exception
    ) as error:  # an odd version must import all the same; hwprune.load needs none of this
        package = watched.partition(".")[0]
        warnings.warn(f"hwprune could not register with {package}: {error!r}", stacklevel=2)


def _is_ours(finder: object) -> bool:
    """By name, so that a second copy of this module knows the finder of the first."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, _Finder.__name__)


def _waits_for(finder: object, watched: str) -> bool:
    return _is_ours(finder) and getattr(finder, "watched", None) == watched


def _remove(watched: str) -> None:
    # A new list, not `remove`: another thread may be walking the old one, and would skip a finder.
    with _lock:
        sys.meta_path = [finder for finder in sys.meta_path if not _waits_for(finder, watched)]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and puts `_Loader` around its loader."""

    def __init__(self, watched: str, register: Callable[[], None]) -> None:
        """Wait for `watched`, then call `register`."""
        self.watched, self.register = watched, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != self.watched:
            if _ready(self.watched):  # it was half imported when we came, and is complete now
                _remove(self.watched)
                _register(self.watched, self.register)
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module by its own loader, which it then leaves in place, and registers."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        """Wrap `loader` for the finder that waited."""
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See `importlib.abc.Loader`."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _remove(self._finder.watched)
        _register(self._finder.watched, self._finder.register)
