"""Mixed requests against servers that are killed with `kill -9` meanwhile: is every token of the engine in the usage?

    benchmarks/usage_exactness.py [--num-requests 10000] [--num-kills 2] [--database-url postgresql://...]

Real server processes, over an engine whose model is a script: the accounting is what is tried. Exits with 1 where a
token is missing or too many.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.serving.mixed_load import run_with_kills

from pelton.store.config import StoreConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=10_000)
    parser.add_argument("--num-kills", type=int, default=2)
    parser.add_argument("--database-url")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = StoreConfig(data_dir=folder, database_url=arguments.database_url)
        result = asyncio.run(run_with_kills(config, arguments.num_requests, arguments.num_kills))
    seen = result.seen
    print("requests:", ", ".join(f"{count} {kind}" for kind, count in sorted(seen.kinds.items())))
    is_exact = True
    for tenant, used in sorted(result.usage.items()):
        num_seen = seen.told[tenant] + seen.delivered[tenant]
        is_exact &= used.num_total >= num_seen
        print(
            f"{tenant}: usage {used.num_prompt_tokens:,} prompt + {used.num_output_tokens:,} output"
            f" = {used.num_total:,}; "
            f"clients know of {num_seen:,}"
        )
    prompt = sum(used.num_prompt_tokens for used in result.usage.values())
    output = sum(used.num_output_tokens for used in result.usage.values())
    is_exact &= result.engine_totals == (prompt, output)
    print(f"all tenants: {prompt:,} + {output:,}; the engines' counters: {result.engine_totals[0]:,} + ", end="")
    print(f"{result.engine_totals[1]:,}; {'exact' if is_exact else 'NOT EXACT'}")
    return 0 if is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
