"""Lightning Fabric, imported without torch's compiler: no run compiles, and importing the compiler takes a second.

Fabric uses one type of `torch._dynamo`, and torch's optimisers use two functions. `PostponedCompiler` replaces the
module and provides these three. If any other attribute is used, the compiler itself is imported and replaces it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


class PostponedCompiler(ModuleType):
    """Replacement for torch's compiler; the compiler is imported when another attribute is used."""

    is_closed = False  # True during the import of Fabric, which would otherwise search for submodules

    class OptimizedModule:
        """Type of compiled modules; no module has this type before the compiler is imported."""

    @staticmethod
    def disable(function: Any, *arguments: Any, **options: Any) -> Any:
        """Return the function unchanged, because nothing is compiled."""
        return function

    @staticmethod
    def graph_break(*arguments: Any) -> None:
        """Do nothing, because nothing is compiled."""

    def __getattr__(self, name: str) -> Any:
        if self.is_closed or (name.startswith("__") and name != "__path__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        compiler = import_module(COMPILER)
        vars(self).update(vars(compiler))  # Other modules may have imported this object.
        return getattr(compiler, name)


compiler = PostponedCompiler(COMPILER)
if sys.modules.setdefault(COMPILER, compiler) is compiler:
    torch._dynamo = compiler  # type: ignore[attr-defined, assignment]
compiler.is_closed = True
from lightning_fabric import Fabric  # noqa: E402
from lightning_fabric.plugins.environments import LightningEnvironment  # noqa: E402
from lightning_fabric.strategies import DDPStrategy  # noqa: E402
from lightning_fabric.wrappers import _FabricModule as FabricModule  # noqa: E402

compiler.is_closed = False

__all__ = ["DDPStrategy", "Fabric", "FabricModule", "LightningEnvironment"]
