"""A contract for import-linter that lists what modules may import; its own contracts list what they may not."""

import sys
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from importlinter.application.contract_utils import AlertLevel, remove_ignored_imports
from importlinter.domain.helpers import module_expressions_to_modules


class OnlyContract(Contract):
    """Modules import each other, the standard library, the allowed modules, and nothing else.

    Imports within functions count. Options: source_modules, allowed_modules (packages), ignore_imports (exceptions).
    """

    source_modules: Any = fields.SetField(subfield=fields.ModuleExpressionField())
    allowed_modules: Any = fields.SetField(subfield=fields.ModuleField())
    ignore_imports: Any = fields.SetField(subfield=fields.ImportExpressionField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        remove_ignored_imports(graph, self.ignore_imports, AlertLevel.NONE)
        sources = {m.name for m in module_expressions_to_modules(graph, self.source_modules)}
        allowed = sys.stdlib_module_names | {module.name for module in self.allowed_modules}
        broken = sorted(
            (source, imported)
            for source in sources
            for imported in graph.find_modules_directly_imported_by(source) - sources
            if imported.partition(".")[0] not in allowed
        )
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for importer, imported in check.metadata["broken"]:
            output.print_error(f"{importer} is not allowed to import {imported}", bold=False)
