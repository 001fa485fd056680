"""An import-linter contract: a package imports the standard library and itself, nothing else."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class StdlibOnlyContract(Contract):
    type_name = "stdlib_only"

    source_package = fields.StringField()

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002
        package = str(self.source_package)
        illegal = []
        for module in sorted({package} | graph.find_descendants(package)):
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                inside = imported == package or imported.startswith(f"{package}.")
                if not inside and imported.split(".")[0] not in sys.stdlib_module_names:
                    illegal.append((module, imported))
        return ContractCheck(kept=not illegal, metadata={"illegal": illegal})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for module, imported in check.metadata["illegal"]:
            output.print_error(f"{module} imports {imported}", bold=False)
