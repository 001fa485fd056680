"""Resident memory of a server whose KV cache holds a given context: what to compare servers by.

    python benchmarks/memory.py [--context 20480] [--requests 4] -- COMMAND OF A SERVER, {port} FILLED IN

The server is told by its own flags to hold that context and no more, as `--num-kv-blocks 1281` tells Pelton and
`-c 20480 -np 4` llama.cpp. As many requests as are asked for then fill it, one after another, with random words of one
token each; what KV they leave stays cached. A server that takes its cache as it starts needs only a short one.
Printed, in MiB, summed over the server's processes: the peak (`VmHWM`), what is resident after that, the proportional
share of it, and what is anonymous; and of how many tokens the server says that they were.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import urllib.request
from pathlib import Path

from processes import ServerProcess, free_port, process_tree, served_model

WORDS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "red",
    "green",
    "blue",
    "black",
    "white",
    "day",
    "night",
    "sun",
    "water",
)
NUM_OUTPUT_TOKENS = 32
START_TIMEOUT_S = 300.0


def complete(url: str, model: str, num_tokens: int, seed: int) -> int:
    words = random.Random(seed).choices(WORDS, k=num_tokens - NUM_OUTPUT_TOKENS)
    body = {"model": model, "prompt": " ".join(words), "max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return int(json.load(response)["usage"]["total_tokens"])


def memory_mib(pid: int) -> dict[str, float]:
    totals: dict[str, float] = {}
    for each in process_tree(pid):
        text = Path(f"/proc/{each}/status").read_text() + Path(f"/proc/{each}/smaps_rollup").read_text()
        fields = {name: int(kb) / 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        for name, value in (
            ("peak", fields["VmHWM"]),
            ("resident", fields["Rss"]),
            ("proportional", fields["Pss"]),
            ("anonymous", fields["Anonymous"]),
        ):
            totals[name] = totals.get(name, 0.0) + value
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=20480)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # A few tokens less than the context: what a server adds of its own has room.
    num_tokens = args.context // args.requests - 64
    command = [part.replace("{port}", str(port)) for part in args.command]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(command, {}, Path(folder) / "log") as server:
        server.wait_first_token(url, START_TIMEOUT_S)
        at_start, model = memory_mib(server.pid), served_model(url)
        counts = [complete(url, model, num_tokens, seed) for seed in range(args.requests)]
        filled = memory_mib(server.pid)
    print(f"{'MiB':<16}{'first token':>12}{f'{sum(counts)} tokens':>16}")
    for name, value in filled.items():
        print(f"{name:<16}{at_start[name]:>12.0f}{value:>16.0f}")


if __name__ == "__main__":
    main()
