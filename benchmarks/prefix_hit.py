"""What a shared prefix saves: time to the first token of a prompt whose first 1,024 tokens were seen before.

    python benchmarks/prefix_hit.py --base-url http://127.0.0.1:8000 [--prefix 1024] [--own 64] [--runs 5]

Each run draws a new prefix; the first request computes all of it, the second shares it. Prompts are token
ids; `cached` is what the server says it found.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import urllib.request


def ask(url: str, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds to the first token, and cached tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as response:
        usage = json.load(response)["usage"]
    return 1000 * (time.perf_counter() - started), usage["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(time.time_ns())
    first, second, cached = [], [], set()
    for _ in range(args.runs):
        prefix = [rng.randrange(1000, 100_000) for _ in range(args.prefix)]
        own = [[rng.randrange(1000, 100_000) for _ in range(args.own)] for _ in range(2)]
        first.append(ask(args.base_url, prefix + own[0])[0])
        took_ms, found = ask(args.base_url, prefix + own[1])
        second.append(took_ms)
        cached.add(found)
    medians = statistics.median(first), statistics.median(second)
    print(
        f"cached {sorted(cached)}  TTFT new {medians[0]:.0f} ms  shared {medians[1]:.0f} ms  "
        f"ratio {medians[0] / medians[1]:.1f}  (tokens: {(args.prefix + args.own) / args.own:.1f})"
    )


if __name__ == "__main__":
    main()
