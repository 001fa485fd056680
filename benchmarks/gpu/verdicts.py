"""What `make gpu-check` says of its items: results that are wrong, and limits that were reached or not.

A wrong result fails the check; a missed limit is a figure to work on. Both are judged from rows alone, so that a
file of results can be judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]
Items = Mapping[str, Mapping[str, Any]]

# Relative errors, as norms, of products beside what their rounded weights stand for: rounding of rows included.
MOST_PRODUCT_ERROR = {"bf16": 6e-3, "int4 g128": 6e-3, "int8": 2e-2, "fp8": 6e-2, "fp8_block": 6e-2}
OF_THE_PEER = 4.0
FIRST_TOKEN_S = 10.0  # from the start of the process, kernels compiled before
PAIR = ("throughput bf16", "transformers bf16")


@dataclass(frozen=True, slots=True)
class Limit:
    """`reached` is found in an item's row; it must be `least` or more."""

    name: str
    item: str
    least: float
    matches: Callable[[Row], bool]
    reached: Callable[[Row], float | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    least: float
    reached: float | None  # None: nothing was measured

    @property
    def word(self) -> str:
        if self.reached is None:
            return "not measured"
        return "pass" if self.reached >= self.least else "fall short"


def _share(row: Row) -> float | None:
    return row.get("share")


def _stream(name: str, weights: str) -> Limit:
    return Limit(name, "single stream", 0.85, lambda row: row.get("weights") == weights, _share)


def _of_the_start(row: Row) -> float | None:
    first_token_s = row.get("first_token_s")
    return None if first_token_s is None else FIRST_TOKEN_S / first_token_s


LIMITS = (
    Limit(
        "first token of the 8B: 10 s over what it took",
        "single stream",
        1.0,
        lambda row: row.get("weights") == "bfloat16",
        _of_the_start,
    ),
    _stream("single stream, bf16: bytes of weights beside a copy", "bfloat16"),
    _stream("single stream, fp8", "fp8"),
    _stream("single stream, int4", "int4"),
    Limit("prefill of 8,192 tokens beside a bf16 product", "prefill 8192", 0.65, lambda row: "tflop_s" in row, _share),
    Limit(
        "decode attention, 256 x 2K, beside a copy",
        "attention",
        0.75,
        lambda row: row.get("name") == "decode 256 x 2K",
        _share,
    ),
    Limit("device busy, batch 256", "busy", 0.97, lambda row: "batch" in row, lambda row: row.get("busy")),
)


def judge(items: Items) -> list[Verdict]:
    """The limits of the items that were asked for."""
    verdicts = []
    for limit in LIMITS:
        if limit.item not in items:
            continue
        found = [row for row in _rows(items, limit.item) if limit.matches(row)]
        verdicts.append(Verdict(limit.name, limit.least, limit.reached(found[0]) if found else None))
    return [*verdicts, *_beside_the_peer(items)]


def _beside_the_peer(items: Items) -> list[Verdict]:
    """Output tokens/s of Pelton over those of transformers, by (input, output), both in bf16."""
    own, peer = ({(row["input"], row["output"]): row["output_tok_s"] for row in _rows(items, name)} for name in PAIR)
    if not set(PAIR) <= set(items):
        return []
    return [
        Verdict(
            f"throughput {lengths[0]}/{lengths[1]}, bf16, in transformers' continuous batching",
            OF_THE_PEER,
            own[lengths] / peer[lengths] if lengths in own and lengths in peer else None,
        )
        for lengths in ((128, 128), (1000, 1000), (2048, 128))
    ]


def wrong_results(items: Items) -> list[str]:
    """What the rows say that is not so; an item that raised is not among them."""
    wrong = []
    for row in _rows(items, "kernels"):
        errors = {name: value for name, value in row.items() if name != "most_error" and isinstance(value, float)}
        wrong += [
            f"kernels, {row['part']}: {name} {error:.1e} from float64"
            for name, error in errors.items()
            if not error <= row["most_error"]
        ]
    for row in _rows(items, "attention"):
        if not row["error"] <= row["most_error"]:
            wrong.append(f"attention, {row['name']}: error {row['error']:.1e}")
        if row["same_bits"] is False:
            wrong.append(f"attention, {row['name']}: other bits in other company")
    for row in _rows(items, "products"):
        if not row["error"] <= MOST_PRODUCT_ERROR[row["kind"]]:
            wrong.append(f"product, {row['kind']} {row['shape']} x {row['num_rows']}: error {row['error']:.1e}")
        if row["same_bits"] is False:
            wrong.append(f"product, {row['kind']} {row['shape']} x {row['num_rows']}: other bits in other company")
    return wrong


def _rows(items: Items, name: str) -> Rows:
    """But those of parts that failed."""
    return [row for row in items.get(name, {}).get("rows", ()) if "failed" not in row]


def failures(items: Items) -> list[str]:
    """Items, and parts of them, that gave no result."""
    found = []
    for name, result in items.items():
        if "error" in result:
            found.append(name)
        found += [f"{name} ({row['part']})" for row in result["rows"] if "failed" in row]
    return found
