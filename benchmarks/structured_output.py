"""Structured output over real schemas: what is refused, what the mask lets through, what it costs.

    python benchmarks/structured_output.py masks    --data ../shared/data/jsonschema_cases.jsonl [--walks 3]
    python benchmarks/structured_output.py generate --data ... [--cases 0:40] [--output results.json]
    python benchmarks/structured_output.py speed    [--requests 16] [--tokens 64] [--rounds 5]

Cases are lines of JSON with `name`, `schema` and `tests` (instances, each `valid` or not), as in JSONSchemaBench.
`masks` needs no model but its vocabulary: every schema goes through the server's helper process, every instance through
the matcher, token by token, and random walks through the mask look for what it should not let through. An object's
keys follow the order of the schema; instances with another order are counted apart. `generate` asks the model, greedy
and sampled, and validates with `jsonschema`; it goes on where its `--output` ends. `speed` compares decoding with a
schema and without, in alternate rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from pelton import LLM, Grammar, GrammarKind, SamplingParams
from pelton.core.request import FinishReason
from pelton.serving.grammar.check import check_without_vocabulary
from pelton.serving.grammar.checker import GrammarChecker
from pelton.weights.catalog import resolve_model
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.weights.tokenizer import Tokenizer, load_tokenizer
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarError, GrammarVocabulary

TIME_LIMIT_S = 2.0
NAMES_SHOWN = 40
PROMPT_CHARS = 1200


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    schema: Any
    tests: list[dict[str, Any]]

    @property
    def grammar(self) -> Grammar:
        return Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(self.schema))

    def problem(self, value: Any) -> str | None:
        """What `jsonschema` says against `value`."""
        validator = jsonschema.validators.validator_for(self.schema, default=jsonschema.Draft202012Validator)
        error = next(validator(self.schema).iter_errors(value), None)
        return error.message[:200] if error is not None else None


def read_cases(path: Path, part: str) -> list[Case]:
    cases = [
        Case(case["name"], case["schema"], case["tests"])
        for case in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    low, _, high = part.partition(":")
    return cases[int(low or 0) : int(high) if high else None]


def open_vocabulary(model: str) -> tuple[Tokenizer, int]:
    path = resolve_model(ModelConfig(model=model))
    files = open_model(path)
    return load_tokenizer(path, files=files), files.spec.vocab_size


# -- masks ----------------------------------------------------------------------------------------


async def check_all(checker: GrammarChecker, cases: list[Case]) -> dict[str, Any]:
    """By name: the grammar as the worker is to have it, or why not; and the seconds it took."""
    await checker.check(Grammar(kind=GrammarKind.JSON_OBJECT), "start")  # the helper's own start
    found = {}
    for case in cases:
        start_s = time.perf_counter()
        try:
            answer: Any = await checker.check(case.grammar, "schema")
        except GrammarError as error:
            answer = str(error)
        found[case.name] = (answer, time.perf_counter() - start_s)
    return found


class Walker:
    """Texts through the matchers of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._compiler = GrammarCompiler(GrammarVocabulary.of(tokenizer, vocab_size))
        self._rng = random.Random(1)

    def accepts(self, grammar: Grammar, value: Any) -> bool:
        """Whether each token of `value` as JSON is in the mask, and the end after the last."""
        matcher = self._compiler.compile(grammar)
        token_ids = self.tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False)
        for token_id in token_ids:
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
            if not mask[token_id // 32] >> (token_id % 32) & 1 or not matcher.consume_token(token_id):
                return False
        return matcher.is_accepting()

    def begins(self, grammar: Grammar, token_ids: list[int]) -> bool:
        """Whether an instance may begin with these tokens, or be them."""
        matcher = self._compiler.compile(check_without_vocabulary(grammar))
        return matcher.try_consume_tokens(token_ids) == len(token_ids)

    def random_text(self, grammar: Grammar, max_tokens: int) -> str | None:
        """Tokens drawn evenly from the masks; None where no end was found."""
        matcher = self._compiler.compile(grammar)
        token_ids: list[int] = []
        while len(token_ids) < max_tokens and not matcher.is_stopped():
            if matcher.is_accepting() and self._rng.random() < 0.5:
                break
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            bits[list(self.tokenizer.eos_token_ids)] = 0
            allowed = np.flatnonzero(bits)
            # In free text the first ids, single characters, come to an end sooner.
            few = allowed[:100] if self._rng.random() < 0.5 else allowed
            token_ids.append(int(few[self._rng.randrange(len(few))]))
            matcher.consume_token(token_ids[-1])
        if not matcher.is_accepting():
            return None
        return b"".join(map(self.tokenizer.token_bytes, token_ids)).decode(errors="replace")


def in_schema_order(value: Any, schema: Any) -> Any:
    """`value` with the keys of objects in the order in which `schema` lists them, as far as it plainly does."""
    if isinstance(value, dict) and isinstance(schema, dict):
        properties = schema.get("properties") or {}
        names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
        return {name: in_schema_order(value[name], properties.get(name)) for name in names}
    if isinstance(value, list) and isinstance(schema, dict):
        return [in_schema_order(item, schema.get("items")) for item in value]
    return value


def measure_masks(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = read_cases(arguments.data, arguments.cases)
    tokenizer, vocab_size = open_vocabulary(arguments.model)
    checker = GrammarChecker(tokenizer, vocab_size)
    found = asyncio.run(check_all(checker, cases))
    checker.close()
    walker = Walker(tokenizer, vocab_size)
    counts: Counter[str] = Counter()
    wrong = []
    for case in cases:
        grammar, _ = found[case.name]
        if not isinstance(grammar, Grammar):
            continue
        for test in case.tests:
            kind = "valid" if test["valid"] else "invalid"
            accepted = walker.accepts(grammar, test["data"])
            if test["valid"] and not accepted:
                accepted = walker.accepts(grammar, in_schema_order(test["data"], case.schema))
                counts["valid only in the schema's order of keys"] += accepted
            counts[f"{kind} {'accepted' if accepted else 'rejected'}"] += 1
            if accepted != test["valid"]:
                wrong.append((case.name, kind))
        for _ in range(arguments.walks):
            text = walker.random_text(grammar, 150)
            if text is None:
                counts["walks without an end"] += 1
                continue
            problem = case.problem(json.loads(text))
            counts["walks that validate" if problem is None else "walks that do not validate"] += 1
            if problem is not None:
                wrong.append((case.name, f"{text[:80]}: {problem}"))
    times_s = [seconds for _, seconds in found.values()]
    refused = {name: answer for name, (answer, _) in found.items() if not isinstance(answer, Grammar)}
    return {
        "schemas": len(cases),
        "accepted": len(cases) - len(refused),
        "coverage": round(1 - len(refused) / len(cases), 3),
        "slowest_ms": round(1000 * max(times_s), 1),
        "median_ms": round(1000 * statistics.median(times_s), 1),
        "all_within_2_s": max(times_s) <= TIME_LIMIT_S,
        "counts": dict(counts),
        "wrong": wrong[:NAMES_SHOWN],
        "refused": refused,
    }


# -- generation -----------------------------------------------------------------------------------


def prompt_of(case: Case) -> list[dict[str, str]]:
    schema = json.dumps(case.schema)[:PROMPT_CHARS]
    return [{"role": "user", "content": f"Give a short example, as JSON, of what this schema describes:\n{schema}"}]


def accepted_cases(cases: list[Case]) -> list[Case]:
    accepted = []
    for case in cases:
        try:
            check_without_vocabulary(case.grammar)
        except GrammarError:
            continue
        accepted.append(case)
    return accepted


def measure_generation(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = read_cases(arguments.data, arguments.cases)
    accepted = accepted_cases(cases)
    results: dict[str, dict[str, Any]] = {}
    if arguments.output is not None and arguments.output.exists():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))["results"]
    left = [case for case in accepted if case.name not in results]
    until_s = time.monotonic() + arguments.seconds
    walker = Walker(*open_vocabulary(arguments.model))
    with LLM(arguments.model, max_num_seqs=arguments.requests, max_model_len=4096) as llm:
        while left and time.monotonic() < until_s:
            here, left = left[: arguments.requests], left[arguments.requests :]
            asked = [(case, kind) for case in here for kind in TEMPERATURES]
            answers = llm.chat(
                [prompt_of(case) for case, _ in asked],
                [
                    SamplingParams(
                        temperature=TEMPERATURES[kind], seed=1, max_tokens=arguments.tokens, grammar=case.grammar
                    )
                    for case, kind in asked
                ],
            )
            for (case, kind), answer in zip(asked, answers, strict=True):
                found = judge(case, answer.sequences[0], walker)
                results.setdefault(case.name, {})[kind] = found | {"tokens": arguments.tokens}
            write_report(generation_report(results, left), arguments.output)
    return generation_report(results, left)


def generation_report(results: dict[str, dict[str, Any]], left: list[Case]) -> dict[str, Any]:
    counts = Counter(f"{kind} {found['is']}" for result in results.values() for kind, found in result.items())
    return {
        "accepted": len(results),
        "num_left": len(left),
        "counts": dict(sorted(counts.items())),
        "wrong": [(name, result) for name, result in results.items() if is_wrong(result)][:NAMES_SHOWN],
        "results": results,
    }


TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def judge(case: Case, sequence: Any, walker: Walker) -> dict[str, Any]:
    """An answer that ended must validate, one that was cut must be what an instance may begin with."""
    if sequence.finish_reason is FinishReason.LENGTH:
        return {"is": "cut" if walker.begins(case.grammar, sequence.token_ids) else "cut, no beginning"}
    try:
        problem = case.problem(json.loads(sequence.text))
    except ValueError as error:
        problem = str(error)
    if problem is None:
        return {"is": "valid"}
    return {"is": "invalid", "problem": problem, "text": sequence.text}


def is_wrong(result: dict[str, Any]) -> bool:
    return any(found["is"] not in ("valid", "cut") for found in result.values())


# -- speed ----------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+[.](com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["new", "regular", "staff"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
PEOPLE = Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps({"type": "array", "items": PERSON, "minItems": 100}))


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways decode the same number of tokens, in turns."""
    prompts = [[{"role": "user", "content": f"List {100 + i} people as JSON."}] for i in range(arguments.requests)]
    times_s: dict[str, list[float]] = {"free": [], "schema": []}
    with LLM(arguments.model, max_num_seqs=arguments.requests, max_model_len=512) as llm:

        def decode(grammar: Grammar | None) -> float:
            sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True, grammar=grammar)
            start_s = time.perf_counter()
            answers = llm.chat(prompts, sampling)
            elapsed_s = time.perf_counter() - start_s
            assert all(len(answer.sequences[0].token_ids) == arguments.tokens for answer in answers)
            return elapsed_s

        decode(None)
        decode(PEOPLE)
        for _ in range(arguments.rounds):
            times_s["free"].append(decode(None))
            times_s["schema"].append(decode(PEOPLE))
    ratios = [schema / free for schema, free in zip(times_s["schema"], times_s["free"], strict=True)]
    return {
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "rounds_s": {name: [round(value, 3) for value in values] for name, values in times_s.items()},
        "median_s": {name: round(statistics.median(values), 3) for name, values in times_s.items()},
        "cost_percent": round(100 * (statistics.median(ratios) - 1), 2),
    }


MODES = {"masks": measure_masks, "generate": measure_generation, "speed": measure_speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", default=":", help="which of them, as in Python: 0:40")
    parser.add_argument("--walks", type=int, default=3, help="random texts per schema")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is generated")
    parser.add_argument("--output", type=Path, help="what `generate` finds in it is not generated again")
    arguments = parser.parse_args()
    if arguments.mode != "speed" and arguments.data is None:
        parser.error("--data is needed")
    report = MODES[arguments.mode](arguments)
    print(json.dumps({name: value for name, value in report.items() if name != "results"}, indent=1))
    write_report(report, arguments.output)


def write_report(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


if __name__ == "__main__":
    main()
