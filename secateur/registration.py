"""What waits until transformers is imported: above all that it learns of our quantizer.

That one is not imported before a checkpoint of ours is opened.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHOD = "secateur"


def register_later() -> None:
    """Enter it where transformers looks for quantizers, as soon as that is imported."""
    when_imported("transformers.quantizers.auto", _enter)


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call an action once: now, if that module is imported already, else right after it has been."""
    finder = _Finder(name, action)
    sys.meta_path.insert(0, finder)
    if name in sys.modules:
        importlib.import_module(name)  # waits where another thread is still at it
        finder.act()


class _Finder(MetaPathFinder):
    """Has those behind it find one module, and acts when that has run."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name = name
        self.actions = [action]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self not in sys.meta_path:
            return None
        # Those behind it only: one that asks all others, too, would ask it again.
        behind = [each for each in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(each, "find_spec")]
        spec = next(filter(None, (each.find_spec(fullname, path, target) for each in behind)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == self.name:  # some loaders are of several modules
                    self.act()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def act(self) -> None:
        """Do it, if it is not done yet."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        actions, self.actions = self.actions, []
        for action in actions:
            action()


def _enter() -> None:
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, _Later("SecateurConfig"))
    auto.AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, _Later("SecateurQuantizer"))


class _Later:
    """Stands for a class of the quantizer's module, which takes its place among those of transformers when it is imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _real(self) -> Any:
        from secateur.plugin import quantizer

        return getattr(quantizer, self._name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._real()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "_name":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._real(), name)
