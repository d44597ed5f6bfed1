"""Register with timm when timm is imported, whoever imports it, without importing it ourselves.

Until then one finder waits at the front of `sys.meta_path`. It wraps the loading of `timm.models` alone,
and is gone once that has run. Where timm is never imported, or absent, nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_WATCHED = "timm.models"  # timm's registry is complete when this module has run
_lock = threading.Lock()


def install() -> None:
    """Register our builder with timm: now if timm is imported, else right after it is.

    Safe to call again, from several threads, with timm absent, and while timm is being imported.
    """
    if _WATCHED in sys.modules and not _ready():
        importlib.import_module(
            _WATCHED
        )  # waits where another thread is at it; else returns at once
    with _lock:
        if not _ready():
            if not any(map(_is_ours, sys.meta_path)):
                sys.meta_path.insert(0, _Finder())
            return
    _register()


def _ready() -> bool:
    """Whether timm.models has run to its end."""
    module = sys.modules.get(_WATCHED)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _register() -> None:
    try:
        from hwprune.integrations.timm_registry import register

        register()
    except (
        Exception
    ) as error:  # an odd timm must import all the same; hwprune.load does not need this
        warnings.warn(f"hwprune could not register with timm: {error!r}", stacklevel=2)


def _is_ours(finder: object) -> bool:
    """By name, so that a second copy of this module knows the finder of the first."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, _Finder.__name__)


def _remove() -> None:
    # A new list, not `remove`: another thread may be walking the old one, and would skip a finder.
    with _lock:
        sys.meta_path = [finder for finder in sys.meta_path if not _is_ours(finder)]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds timm.models as the other finders do, and puts `_Loader` around its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != _WATCHED:
            if _ready():  # timm was half imported when we came, and is complete now
                _remove()
                _register()
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module by its own loader, which it then leaves in place, and registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        """Wrap `loader`."""
        self._loader = loader

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
        _remove()
        _register()
