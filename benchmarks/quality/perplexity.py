"""Perplexity of a text under Pelton's engine, window by window, as llama.cpp's perplexity tool measures it.

    python benchmarks/quality/perplexity.py --model MODEL --text wikitext2_test.txt --output native.json
    python benchmarks/quality/perplexity.py --model MODEL --text wikitext2_test.txt --output fp32.json \\
        --set kernel_backend=reference --set dtype=float32 --set kv_cache_dtype=float32
    python benchmarks/quality/perplexity.py --compare native.json fp32.json

The text is cut into windows of `--context` tokens that do not overlap; a rest is left out. Where the tokenizer adds a
first token (BOS), every window begins with it. Of each window the tokens of the second half are scored, which have
half a window of context at least (`--score all`: every token but the first). The error is the standard error over
tokens; that of a ratio is over windows, pair by pair, since both runs saw the same tokens.

`--output` is written after every few windows; `--resume` goes on with those that are there, so that a long run may be
stopped at any time. `--set NAME=VALUE` is any setting of `pelton serve`. llama.cpp's figure for the same protocol:
`llama-perplexity -m MODEL -f TEXT -c CONTEXT --chunks N` (its batch size changes nothing but the time).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WINDOWS_PER_CALL = 4


@dataclass
class Score:
    """Negative log-likelihoods in nats. `windows` holds the mean of each."""

    model: str
    text: str
    settings: dict[str, Any]
    context: int
    score: str
    windows: list[float] = field(default_factory=list)
    num_tokens: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    elapsed_s: float = 0.0

    def add(self, losses: Sequence[float]) -> None:
        self.windows.append(statistics.fmean(losses))
        self.num_tokens += len(losses)
        self.total += math.fsum(losses)
        self.total_squares += math.fsum(loss * loss for loss in losses)

    @property
    def perplexity(self) -> float:
        return math.exp(self.total / self.num_tokens)

    @property
    def standard_error(self) -> float:
        mean = self.total / self.num_tokens
        variance = max(0.0, self.total_squares / self.num_tokens - mean * mean)
        return self.perplexity * math.sqrt(variance / max(1, self.num_tokens - 1))

    def save(self, path: Path) -> None:
        document = {**asdict(self), "perplexity": self.perplexity, "standard_error": self.standard_error}
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def take_over(self, path: Path) -> None:
        """The windows that an earlier run has left in `path`, if there is such a file."""
        if not path.exists():
            return
        document = json.loads(path.read_text(encoding="utf-8"))
        for name in ("model", "text", "settings", "context", "score"):
            if document[name] != getattr(self, name):
                raise SystemExit(f"--resume: {path} has {name} {document[name]!r}, not {getattr(self, name)!r}")
        for name in ("windows", "num_tokens", "total", "total_squares", "elapsed_s"):
            setattr(self, name, document[name])


def cut_windows(token_ids: Sequence[int], context: int, bos_id: int | None) -> Iterator[list[int]]:
    """Windows of `context` tokens; `bos_id`, where given, takes the place of the first of each."""
    for start in range(0, len(token_ids) - context + 1, context):
        window = list(token_ids[start : start + context])
        if bos_id is not None:
            window[0] = bos_id
        yield window


def first_scored(context: int, score: str) -> int:
    """Position of the first token whose probability counts."""
    return 1 if score == "all" else context // 2 + 1


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Perplexity of `mine` by that of `theirs` over the windows that both have, and its standard error."""
    differences = [a - b for a, b in zip(mine, theirs, strict=False)]
    quotient = math.exp(statistics.fmean(differences))
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return quotient, quotient * error


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    from pelton.cli.settings import all_settings, parse_text

    settings = all_settings()
    values = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in settings:
            raise SystemExit(f"--set {text}: there is no setting {name}")
        values[name] = parse_text(settings[name], value)
    return values


def measure(args: argparse.Namespace) -> Score:
    from pelton.core.sampling_params import SamplingParams
    from pelton.llm import LLM

    given = parse_settings(args.set)
    settings = {"max_model_len": args.context + 1, "max_num_seqs": WINDOWS_PER_CALL, **given}
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    score = Score(Path(args.model).name, args.text.name, given, args.context, args.score)
    if args.resume:
        score.take_over(args.output)
    start_s = time.perf_counter() - score.elapsed_s
    with LLM(args.model, **settings) as llm:
        # llama.cpp drops a last line break too.
        token_ids = llm.tokenizer.encode(args.text.read_text(encoding="utf-8").removesuffix("\n"))
        adds_bos = llm.tokenizer.bos_token_id is not None and token_ids[0] == llm.tokenizer.bos_token_id
        windows = list(cut_windows(token_ids, args.context, llm.tokenizer.bos_token_id if adds_bos else None))
        windows = windows[: args.chunks]
        if not windows:
            raise SystemExit(f"the text has {len(token_ids)} tokens, less than one window of {args.context}")
        first = first_scored(args.context, args.score)
        for low in range(len(score.windows), len(windows), WINDOWS_PER_CALL):
            for generation in llm.generate(windows[low : low + WINDOWS_PER_CALL], sampling):
                assert generation.prompt_logprobs is not None
                # Entry i is the logprob of token i + 1.
                score.add([-entry.logprob for entry in generation.prompt_logprobs[first - 1 :]])
            score.elapsed_s = round(time.perf_counter() - start_s, 1)
            if args.output:
                score.save(args.output)
            done = f"[{len(score.windows)}/{len(windows)}] {score.perplexity:.4f} +- {score.standard_error:.4f}"
            print(done, file=sys.stderr, flush=True)
    return score


def compare(mine: Path, theirs: Path) -> None:
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (mine, theirs))
    for name in ("model", "context", "score"):
        if a[name] != b[name]:
            print(f"note: {name} differs: {a[name]} and {b[name]}", file=sys.stderr)
    num_windows = min(len(a["windows"]), len(b["windows"]))
    quotient, error = ratio(a["windows"], b["windows"])
    print(f"{mine.name}: {a['perplexity']:.4f} +- {a['standard_error']:.4f}")
    print(f"{theirs.name}: {b['perplexity']:.4f} +- {b['standard_error']:.4f}")
    print(f"ratio {quotient:.5f} +- {error:.5f} ({100 * (quotient - 1):+.3f}%), {num_windows} windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="windows to score; default: all")
    parser.add_argument("--score", choices=("second-half", "all"), default="second-half")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with the windows that --output has")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("MINE", "REFERENCE"))
    args = parser.parse_args()
    if args.compare:
        compare(*args.compare)
        return
    if args.model is None or args.text is None:
        parser.error("--model and --text are needed, or --compare")
    if args.context < 4:
        parser.error("--context must be at least 4")
    if args.resume and args.output is None:
        parser.error("--resume needs --output")
    score = measure(args)
    print(
        f"perplexity {score.perplexity:.4f} +- {score.standard_error:.4f}  "
        f"({score.num_tokens} tokens of {len(score.windows)} windows of {args.context}, {score.elapsed_s:.0f} s)"
    )


if __name__ == "__main__":
    main()
