"""`pelton generate`: completions without a server, of one prompt or of a file of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

from pelton.cli.flags import with_settings
from pelton.cli.pull import pull_model
from pelton.cli.settings import all_settings, resolve_settings
from pelton.core.errors import ConfigError, PeltonError
from pelton.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pelton.build import PeltonConfig
    from pelton.llm import LLM

InputFlag = Annotated[
    Path | None,
    Parameter(name="--input", help='JSON lines, each with "prompt" (a text) or "messages"; other keys stay'),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """Fields of `SamplingParams` that a flag can set; None: the model's own default."""

    max_tokens: Annotated[int | None, Parameter(help="longest answer; default: 256")] = None
    temperature: Annotated[float | None, Parameter(help="0: always the likeliest token; default: the model's")] = None
    top_p: Annotated[float | None, Parameter(help="draw from the likeliest tokens of this share")] = None
    top_k: Annotated[int | None, Parameter(help="draw from so many of the likeliest tokens")] = None
    seed: Annotated[int | None, Parameter(help="the same seed gives the same answer")] = None
    stop: Annotated[tuple[str, ...] | None, Parameter(help="texts that end the answer", negative=())] = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


_NO_FLAGS = SamplingFlags()


@with_settings(("model", "engine", "worker"))
def generate(
    *,
    prompt: Annotated[str | None, Parameter(help="what to complete; default: standard input")] = None,
    chat: Annotated[bool, Parameter(negative=(), help="the prompt is a user's message to a chat model")] = False,
    input_path: InputFlag = None,
    output: Annotated[Path | None, Parameter(help="where answers to --input go; default: standard output")] = None,
    sampling: Annotated[SamplingFlags, Parameter(name="*")] = _NO_FLAGS,
    config: Annotated[Path | None, Parameter(help="YAML file with settings")] = None,
    **settings: Any,
) -> int:
    """Complete a prompt, or every prompt of a file, without a server."""
    resolved = resolve_settings(settings, os.environ, config)
    overrides = sampling.given()
    SamplingParams(**overrides)  # a wrong value is told before the model is loaded
    if input_path is not None:
        if prompt is not None:
            raise ConfigError("--prompt and --input exclude each other")
        tasks = read_tasks(input_path, chat=chat)
        with _load(resolved) as llm:
            return _run_file(llm, tasks, overrides, output)
    if output is not None:
        raise ConfigError("--output goes with --input")
    task = Task(prompt if prompt is not None else sys.stdin.read(), chat=chat)
    with _load(resolved) as llm:
        for delta in llm.stream(task.to_prompt(), replace(llm.default_sampling, **overrides)):
            print(delta.text, end="", flush=True)
    print()
    return 0


@dataclass(frozen=True, slots=True)
class Task:
    """`content` is a text or messages; `row` is the input line that it came from."""

    content: str | list[dict[str, Any]]
    chat: bool = False
    row: dict[str, Any] | None = None

    def to_prompt(self) -> str | list[dict[str, Any]]:
        if self.chat and isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return self.content


def read_tasks(path: Path, *, chat: bool = False) -> list[Task]:
    """Raises `ConfigError` naming the first wrong line, so that nothing is computed for a broken file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None
        content = _content(row)
        if content is None:
            raise ConfigError(f'{path}: line {number} must be an object with "prompt" (a text) or "messages" (a list)')
        tasks.append(Task(content, chat, row))
    if not tasks:
        raise ConfigError(f"{path}: there is no prompt in it")
    return tasks


def _content(row: Any) -> str | list[dict[str, Any]] | None:
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return messages
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, str) else None


@contextmanager
def _load(config: PeltonConfig) -> Iterator[LLM]:
    config.worker.require_packages()
    path = pull_model(config.model)

    from rich.console import Console

    with Console(stderr=True).status(f"Loading {path.name}"):
        from pelton.llm import LLM

        values = {s.name: getattr(getattr(config, s.room), s.name) for s in all_settings().values()}
        llm = LLM(**{**values, "model": str(path)})
    with llm:
        yield llm


def _run_file(llm: LLM, tasks: list[Task], overrides: dict[str, Any], output: Path | None) -> int:
    """One line out for each line in, in order; a request that fails has "error" instead of "text"."""
    sampling = replace(llm.default_sampling, **overrides)
    # More threads than the engine runs at once, so that the next requests are there when one ends.
    with ThreadPoolExecutor(max_workers=128) as pool:
        rows = pool.map(lambda task: _run_task(llm, task, sampling), tasks)
        try:
            if output is None:
                return _write_rows(rows, len(tasks), sys.stdout)
            with output.open("w", encoding="utf-8") as file:
                return _write_rows(rows, len(tasks), file)
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_task(llm: LLM, task: Task, sampling: SamplingParams) -> dict[str, Any]:
    row = dict(task.row or {})
    try:
        prompt = task.to_prompt()
        answers = llm.generate(prompt, sampling) if isinstance(prompt, str) else llm.chat(prompt, sampling)
    except PeltonError as error:
        return {**row, "error": {"code": error.code, "message": str(error)}}
    sequence = answers[0].sequences[0]
    return {
        **row,
        "text": sequence.text,
        "finish_reason": str(sequence.finish_reason),
        "num_prompt_tokens": len(answers[0].prompt_token_ids),
        "num_output_tokens": len(sequence.token_ids),
    }


def _write_rows(rows: Iterable[dict[str, Any]], num_rows: int, file: TextIO) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
    )
    num_tokens = num_failed = 0
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task_id = bar.add_task("", total=num_rows, tokens=0)
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            num_tokens += row.get("num_output_tokens", 0)
            num_failed += "error" in row
            bar.update(task_id, advance=1, tokens=num_tokens)
    if num_failed:
        print(f'pelton: {num_failed} of {num_rows} prompts failed; see their "error"', file=sys.stderr)
    return 1 if num_failed else 0
