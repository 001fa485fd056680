"""Prints the size budgets of the house as a table; exits with 1 where one is exceeded.

usage: check_size.py [ROOT]

Lines of a function are counted from `def` to its last line, without its docstring; arguments without
`self` and `cls`.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = "lines in a file"
FUNCTION_LINES = "lines in a function"
ARGUMENTS = "arguments"

LIMITS = {FILE_LINES: 400, FUNCTION_LINES: 60, ARGUMENTS: 8}

# Budgets of their own, for the files and functions that rot first.
OWN_LIMITS = {
    (FILE_LINES, "src/pelton/worker/model_runner.py"): 500,
    (FUNCTION_LINES, "src/pelton/engine/scheduler.py:Scheduler.schedule"): 80,
}

# Exempt by name, each with its reason: (budget, place as the table prints it, why).
_GPU_KERNELS = "src/pelton/worker/kernels/triton/*:*_kernel"
EXEMPTIONS: tuple[tuple[str, str, str], ...] = (
    (ARGUMENTS, _GPU_KERNELS, "a kernel is given one by one what it reads and what it is compiled for"),
    (ARGUMENTS, "src/pelton/worker/kernels/triton/*_kernels.py:*", "nor can its parts be handed objects"),
    (FUNCTION_LINES, _GPU_KERNELS, "what a kernel keeps in registers cannot be handed to functions"),
)

FOLDERS = ("src", "scripts", "benchmarks")


@dataclass(frozen=True, slots=True)
class Measure:
    budget: str
    place: str
    value: int

    @property
    def limit(self) -> int:
        return OWN_LIMITS.get((self.budget, self.place), LIMITS[self.budget])

    @property
    def is_exempt(self) -> bool:
        return any(self.budget == budget and fnmatch.fnmatch(self.place, place) for budget, place, _ in EXEMPTIONS)

    @property
    def is_over(self) -> bool:
        return self.value > self.limit and not self.is_exempt


def measure_file(path: Path, root: Path) -> Iterator[Measure]:
    source = path.read_text(encoding="utf-8")
    place = path.relative_to(root).as_posix()
    yield Measure(FILE_LINES, place, len(source.splitlines()))
    yield from _measure_functions(ast.parse(source, place), place, "")


def _measure_functions(node: ast.AST, place: str, prefix: str) -> Iterator[Measure]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Measure(FUNCTION_LINES, f"{place}:{name}", _num_lines(child))
            yield Measure(ARGUMENTS, f"{place}:{name}", _num_arguments(child))
            yield from _measure_functions(child, place, f"{name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _measure_functions(child, place, f"{name}.")
        else:
            yield from _measure_functions(child, place, prefix)


def _num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def _num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def print_table(measures: list[Measure]) -> None:
    """A row for the largest of every budget, for every budget of its own, and for everything over or exempt."""
    by_budget = ([m for m in measures if m.budget == budget] for budget in LIMITS)
    rows = {max(found, key=lambda m: m.value) for found in by_budget if found}
    rows |= {m for m in measures if (m.budget, m.place) in OWN_LIMITS or m.is_over}
    rows |= {m for m in measures if m.is_exempt and m.value > m.limit}
    width = max(len(m.place) for m in rows)
    print(f"{'budget':<20} {'limit':>5} {'is':>5}  {'where':<{width}}")
    for m in sorted(rows, key=lambda m: (m.budget, -m.value, m.place)):
        verdict = "exempt" if m.is_exempt else "OVER" if m.is_over else "ok"
        print(f"{m.budget:<20} {m.limit:>5} {m.value:>5}  {m.place:<{width}}  {verdict}")


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    measures = [measure for path in paths for measure in measure_file(path, root)]
    print_table(measures)
    stale = [place for budget, place in OWN_LIMITS if not any((m.budget, m.place) == (budget, place) for m in measures)]
    for place in stale:
        print(f"note: {place} has a budget of its own and is not there")
    num_over = sum(m.is_over for m in measures)
    num_files = sum(m.budget == FILE_LINES for m in measures)
    num_lines = sum(m.value for m in measures if m.budget == FILE_LINES)
    print(f"{num_files} files, {num_lines} lines, {num_over} over budget")
    return 1 if num_over else 0


if __name__ == "__main__":
    sys.exit(main())
