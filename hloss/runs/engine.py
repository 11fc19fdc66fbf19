"""Lightning Fabric, imported without torch's compiler: no run uses it, and its import takes a second.

Fabric needs one type of the compiler, and torch's optimisers two functions. A module with these three stands for
`torch._dynamo` until something uses more of it; then the compiler is imported, and all works as without this module.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


class PostponedCompiler(ModuleType):
    """Stands for torch's compiler until it is used."""

    is_closed = False  # while Fabric is imported, which would otherwise look for submodules

    class OptimizedModule:
        """The type of compiled modules, of which there are none yet."""

    @staticmethod
    def disable(function: Any, *arguments: Any, **options: Any) -> Any:
        """Keep a function from being compiled."""
        return function

    @staticmethod
    def graph_break(*arguments: Any) -> None:
        """Let a compiled function end here."""

    def __getattr__(self, name: str) -> Any:
        if self.is_closed or (name.startswith("__") and name != "__path__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        compiler = import_module(COMPILER)
        vars(self).update(vars(compiler))  # for those who have imported this module
        return getattr(compiler, name)


compiler = PostponedCompiler(COMPILER)
if sys.modules.setdefault(COMPILER, compiler) is compiler:
    torch._dynamo = compiler  # type: ignore[attr-defined, assignment]
compiler.is_closed = True
from lightning_fabric import Fabric  # noqa: E402
from lightning_fabric.strategies import DDPStrategy  # noqa: E402
from lightning_fabric.wrappers import _FabricModule as FabricModule  # noqa: E402

compiler.is_closed = False

__all__ = ["DDPStrategy", "Fabric", "FabricModule"]
