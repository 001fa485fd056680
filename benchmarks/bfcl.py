"""BFCL's simple, multiple and parallel categories through `/v1/chat/completions` of any server.

    python benchmarks/bfcl.py --data bfcl_eval-*.whl --url http://127.0.0.1:8000 --model NAME --output results.json

`--data` is the archive of the PyPI package `bfcl-eval` (`pip download --no-deps bfcl-eval`), which is read, not
installed. The check is our own, after BFCL's AST category: the right function, every required parameter, no unknown
one, and each value among the possible answers that the data gives. `--check` adds, for servers that have them, that
streaming gives the very same calls, and that `tool_choice: required` always gives calls that follow their schemas.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import openai

CATEGORIES = {"simple": "simple_python", "multiple": "multiple", "parallel": "parallel"}
_FOLDER = "bfcl_eval/data"
# BFCL's types are Python's; JSON schema has others.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
Call = tuple[str, str]


@dataclass(frozen=True)
class Case:
    case_id: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    expected: list[dict[str, dict[str, list[Any]]]]

    def schema(self, name: str) -> dict[str, Any] | None:
        found = (tool["function"] for tool in self.tools if tool["function"]["name"] == name)
        return next((function["parameters"] for function in found), None)


def load_cases(archive: Path, category: str, start: int, count: int) -> list[Case]:
    """`count` of a category, from number `start` on."""
    name = f"BFCL_v4_{CATEGORIES[category]}.json"
    with zipfile.ZipFile(archive) as file:
        questions = [json.loads(line) for line in file.read(f"{_FOLDER}/{name}").splitlines()]
        answers = [json.loads(line) for line in file.read(f"{_FOLDER}/possible_answer/{name}").splitlines()]
    expected = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [
        Case(
            question["id"],
            category,
            question["question"][0],
            [{"type": "function", "function": _function(function)} for function in question["function"]],
            expected[question["id"]],
        )
        for question in questions[start : start + count]
    ]


def _function(function: dict[str, Any]) -> dict[str, Any]:
    return {name: _schema(value) if name == "parameters" else value for name, value in function.items()}


def _schema(value: Any) -> Any:
    """BFCL's schema as JSON schema."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for name, inner in value.items():
        if name == "type" and isinstance(inner, str):
            if (known := _TYPES.get(inner, inner)) is not None:
                found[name] = known
        elif name not in ("optional", "default", "format"):
            found[name] = _schema(inner)
    return found


def check_calls(case: Case, calls: list[Call]) -> str | None:
    """What is wrong with an answer; None: nothing. The order of parallel calls does not matter."""
    if len(calls) != len(case.expected):
        return f"{len(calls)} calls" if calls else "no call"
    left = list(case.expected)
    problem = None
    for name, text in calls:
        try:
            arguments = json.loads(text)
        except ValueError:
            return "arguments are no JSON"
        problems = [_check_call(case, name, arguments, expected) for expected in left]
        if None in problems:
            left.pop(problems.index(None))
        else:
            problem = problem or problems[0]
    return problem


def _check_call(case: Case, name: str, arguments: Any, expected: dict[str, dict[str, list[Any]]]) -> str | None:
    ((expected_name, possible),) = expected.items()
    if name != expected_name:
        return "another function"
    if not isinstance(arguments, dict):
        return "arguments are no object"
    schema = case.schema(name) or {}
    missing = [key for key in schema.get("required", ()) if key not in arguments]
    if missing:
        return "a required parameter is missing"
    for key, value in arguments.items():
        if key not in possible:
            return "an unknown parameter"
        if not any(_matches(value, allowed) for allowed in possible[key]):
            return "another value"
    omitted = [key for key, values in possible.items() if key not in arguments and "" not in values]
    return "a parameter is missing" if omitted else None


def _matches(value: Any, allowed: Any) -> bool:
    """As BFCL: texts without case, white space and punctuation; 5 is 5.0; within lists and objects alike."""
    if isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed
    if isinstance(value, str) and isinstance(allowed, str):
        return _plain(value) == _plain(allowed)
    if isinstance(value, list) and isinstance(allowed, list):
        return len(value) == len(allowed) and all(map(_matches, value, allowed))
    if isinstance(value, dict) and isinstance(allowed, dict):
        # The possible values of an inner object are lists too.
        return all(
            key in allowed and any(_matches(inner, option) for option in _options(allowed[key]))
            for key, inner in value.items()
        ) and all(key in value or "" in _options(options) for key, options in allowed.items())
    return bool(value == allowed)


def _options(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _plain(text: str) -> str:
    return "".join(char for char in text.lower().replace("'", '"') if char not in " ,./-_*^")


class Asker:
    def __init__(self, url: str, model: str, max_tokens: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}

    async def ask(self, case: Case, **options: Any) -> tuple[list[Call], str]:
        """The calls and the finish reason."""
        answer = await self._client.chat.completions.create(
            messages=case.messages, tools=case.tools, **(self._options | options)
        )
        choice = answer.choices[0]
        calls = choice.message.tool_calls or ()
        return [(call.function.name, call.function.arguments) for call in calls], choice.finish_reason

    async def ask_streaming(self, case: Case, **options: Any) -> tuple[list[Call], str]:
        calls: list[list[str]] = []
        reason = ""
        stream = await self._client.chat.completions.create(
            messages=case.messages, tools=case.tools, stream=True, **(self._options | options)
        )
        async for chunk in stream:
            for choice in chunk.choices:
                for delta in choice.delta.tool_calls or ():
                    if delta.index == len(calls):
                        calls.append(["", ""])
                    calls[delta.index][0] += delta.function.name or ""
                    calls[delta.index][1] += delta.function.arguments or ""
                reason = choice.finish_reason or reason
        return [(name, arguments) for name, arguments in calls], reason


def schema_problem(case: Case, calls: list[Call], reason: str) -> str | None:
    """Why calls under `required` are not valid; an answer that ran out of tokens is told apart."""
    if reason == "length":
        return "length"
    if not calls:
        return "no call"
    for name, text in calls:
        schema = case.schema(name)
        if schema is None:
            return f"{name} is no tool"
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return str(error).splitlines()[0]
    return None


async def run_case(asker: Asker, case: Case, *, check: bool) -> dict[str, Any]:
    # Said at every turn: what holds without it differs from server to server.
    parallel = {"parallel_tool_calls": case.category == "parallel"}
    calls, reason = await asker.ask(case, **parallel)
    result: dict[str, Any] = {"id": case.case_id, "calls": calls, "problem": check_calls(case, calls)}
    required, required_reason = await asker.ask(case, tool_choice="required", **parallel)
    result["required"] = {
        "calls": required,
        "problem": check_calls(case, required),
        "schema": schema_problem(case, required, required_reason),
    }
    if check:
        result["streams_alike"] = await asker.ask_streaming(case, **parallel) == (
            calls,
            reason,
        ) and await asker.ask_streaming(case, tool_choice="required", **parallel) == (required, required_reason)
    return result


class Report:
    """What is known so far, written to `--output` after each case: a run that is cut off goes on where it was."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path: Path | None = args.output
        self._categories: dict[str, dict[str, Any]] = {}
        self._head = {"model": args.model, "label": args.label}
        if self._path is not None and self._path.exists():
            report = json.loads(self._path.read_text(encoding="utf-8"))
            self._categories = report.pop("categories")
            self._head = report

    def has(self, case: Case, *, check: bool) -> bool:
        found = self._results(case.category).get(case.case_id)
        return found is not None and (not check or "streams_alike" in found)

    def add(self, case: Case, result: dict[str, Any], elapsed_s: float) -> None:
        results = self._results(case.category)
        results[case.case_id] = result
        elapsed_s += self._categories.get(case.category, {}).get("elapsed_s", 0.0)
        ordered = sorted(results.values(), key=lambda found: int(found["id"].rsplit("_", 1)[1]))
        self._categories[case.category] = summary(ordered, elapsed_s)
        if self._path is not None:
            part = self._path.with_suffix(".part")
            part.write_text(
                json.dumps(self._head | {"categories": self._categories}, indent=1) + "\n", encoding="utf-8"
            )
            part.replace(self._path)

    def show(self) -> None:
        for category, found in self._categories.items():
            print_summary(category, found)

    def _results(self, category: str) -> dict[str, dict[str, Any]]:
        return {result["id"]: result for result in self._categories.get(category, {}).get("results", ())}


async def run(args: argparse.Namespace) -> None:
    asker = Asker(args.url.rstrip("/"), args.model, args.max_tokens)
    gate = asyncio.Semaphore(args.concurrency)
    report = Report(args)
    until_s = time.monotonic() + args.seconds

    async def one(case: Case) -> None:
        async with gate:
            start_s = time.monotonic()
            if start_s < until_s:
                result = await run_case(asker, case, check=args.check)
                report.add(case, result, time.monotonic() - start_s)

    for category in args.categories.split(","):
        cases = load_cases(args.data, category, args.start, args.count)
        await asyncio.gather(*(one(case) for case in cases if not report.has(case, check=args.check)))
    report.show()


def summary(results: list[dict[str, Any]], elapsed_s: float) -> dict[str, Any]:
    def problems(found: Iterator[str | None]) -> dict[str, int]:
        return dict(Counter(problem for problem in found if problem is not None).most_common())

    auto = problems(result["problem"] for result in results)
    required = problems(result["required"]["problem"] for result in results)
    schema = problems(result["required"]["schema"] for result in results)
    return {
        "num_cases": len(results),
        "auto_right": len(results) - sum(auto.values()),
        "required_right": len(results) - sum(required.values()),
        "required_valid": len(results) - sum(schema.values()),
        "streams_alike": sum(result.get("streams_alike", False) for result in results),
        "streams_asked": sum("streams_alike" in result for result in results),
        "auto_problems": auto,
        "required_problems": required,
        "schema_problems": schema,
        "elapsed_s": round(elapsed_s, 1),  # of all cases, which run beside each other
        "results": results,
    }


def print_summary(category: str, found: dict[str, Any]) -> None:
    count = found["num_cases"]
    alike = f", streams alike {found['streams_alike']} of {found['streams_asked']}"
    print(
        f"{category}: {count} cases, auto {found['auto_right']} right, required {found['required_right']} right and "
        f"{found['required_valid']} valid{alike}, {found['elapsed_s']} s",
        flush=True,
    )
    for name in ("auto_problems", "required_problems", "schema_problems"):
        print(f"  {name}: {found[name]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the wheel of bfcl-eval")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="m")
    parser.add_argument("--label", default="pelton")
    parser.add_argument("--categories", default=",".join(CATEGORIES))
    parser.add_argument("--start", type=int, default=0, help="number of the first case of each category")
    parser.add_argument("--count", type=int, default=70, help="cases of each category")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--check", action="store_true", help="stream each case too, and compare")
    parser.add_argument("--output", type=Path, help="cases that it holds already are not asked again")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further case is begun")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
