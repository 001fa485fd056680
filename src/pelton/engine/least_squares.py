"""Normal equations of three coefficients, as fits of step times have them. Small enough that no library is worth it."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[float, float, float]

# Relative, on the diagonal: equations that barely settle a coefficient still have a solution.
_RIDGE = 1e-9


def solve_chosen(products: Sequence[Sequence[float]], targets: Sequence[float], chosen: Sequence[int]) -> Row | None:
    """Solves `products` [3][3] times coefficients = `targets` [3] for those `chosen`, the others zero.

    None where the equations do not settle them.
    """
    size = len(chosen)
    rows = [[products[i][j] for j in chosen] + [targets[i]] for i in chosen]
    for k in range(size):
        rows[k][k] *= 1.0 + _RIDGE
    for k in range(size):
        pivot = k
        for r in range(k + 1, size):
            if abs(rows[r][k]) > abs(rows[pivot][k]):
                pivot = r
        rows[k], rows[pivot] = rows[pivot], rows[k]
        row = rows[k]
        if row[k] == 0.0:
            return None
        for r in range(size):
            if r != k:
                other = rows[r]
                factor = other[k] / row[k]
                for column in range(k + 1, size + 1):  # those before are zero in `row`, or read no more
                    other[column] -= factor * row[column]
    solution = [0.0, 0.0, 0.0]
    for k, index in enumerate(chosen):
        solution[index] = rows[k][size] / rows[k][k]
    return solution[0], solution[1], solution[2]
