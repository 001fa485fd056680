import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pelton.cli.main import main
from pelton.cli.settings import all_settings


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("PELTON_"):
            monkeypatch.delenv(name)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("serve", "chat", "generate", "models", "bench", "env"):
        assert command in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert run(capsys, "--version") == (0, version("pelton") + "\n", "")


def test_serve_help_has_every_setting_under_its_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "serve", "--help")
    assert code == 0
    settings = all_settings().values()
    panels = {room: out.index(f"{room.title()} settings") for room in dict.fromkeys(s.room for s in settings)}
    assert list(panels.values()) == sorted(panels.values())
    for setting in settings:
        assert setting.flag in out[panels[setting.room] :]
    assert "--no-enable-prefix-caching" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve --max-num-seq 3", "Unknown option: --max-num-seq. Did you mean --max-num-seqs?"),
        ("serve --port eighty", "Invalid value for --port: 'eighty' is not a whole number"),
        ("serve --max-num-seqs 1.5", "Invalid value for --max-num-seqs: '1.5' is not a whole number"),
        ("serve --port", 'Command "serve" parameter --port requires an argument.'),
        ("serve --dtype int3", 'Invalid value "int3" for --dtype. Choose from: "auto", "float32"'),
        ("serve --port 70000", "port is 70000; it must be between 0 and 65535"),
        ("serve --max-num-seqs 64 --max-num-batched-tokens 8", "max_num_batched_tokens (8) is smaller than"),
        ("serve one two", "unexpected argument: two"),
        ("serve --gpu-memory-utilization 0.9", "--gpu-memory-utilization: Pelton does not have this yet; --kv-cache"),
        ("serve m --gpu-memory-utilization=0.9", "--gpu-memory-utilization: Pelton does not have this yet"),
        ("serve -dp 2", "-dp: Pelton does not have this yet"),
        ("serve m -pp=2", "-pp: Pelton does not have this yet"),
        ("serve --speculative-config {}", "--speculative-config: Pelton does not have this yet"),
        ("serve --no-enable-chunked-prefill", "--no-enable-chunked-prefill: prefill is always chunked here"),
        ("serve --config /no/such.yaml", "/no/such.yaml: cannot be read: No such file or directory"),
        ("server", 'Unknown command "server". Did you mean "serve"?'),
        ("models shw x", 'Unknown command "shw". Did you mean "show"?'),
        ("bench serve --workload W9", "there is no workload 'W9'"),
        ("bench serve --runs 0", "the number of passes is 0"),
        ("bench compare a=http://127.0.0.1:1", "compare needs two servers or more, each as NAME=URL"),
        ("bench compare a b", "'a' is not NAME=URL"),
        ("bench compare a=http://x a=http://y", "two servers are called 'a'"),
        ("chat --base-url ftp://x", "'ftp://x' is not a server's address"),
    ],
)
def test_wrong_calls_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"pelton: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("models show no-such-model", "no model is called 'no-such-model'"),
        ("models remove no-such-model", "no-such-model is not on disk"),
        ("serve /no/such/model.gguf", "no model at /no/such/model.gguf"),
        ("chat --base-url http://127.0.0.1:9", "no server answers at http://127.0.0.1:9; `pelton serve` starts one"),
        ("bench serve --base-url http://127.0.0.1:9", "http://127.0.0.1:9 does not answer"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.setenv("PELTON_CACHE_DIR", str(tmp_path))
    code, _, err = run(capsys, *arguments.split())
    assert code == 1
    assert err.startswith(f"pelton: {message}")
    assert err.count("\n") == 1


def test_models_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "models", "list", "--json", "--cache-dir", str(tmp_path))
    assert code == 0
    models = {model["name"]: model for model in json.loads(out)}
    assert models["qwen2.5-coder-0.5b-instruct"]["path"] is None
    code, out, _ = run(capsys, "models", "list", "--cache-dir", str(tmp_path))
    assert "491 MB" in out


@pytest.mark.torch
def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELTON_THREADS", "3")
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    machine = json.loads(out)
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["versions"]["pelton"]
    assert machine["threads"] == 3
    monkeypatch.setenv("PELTON_KERNEL_BACKEND", "reference")
    assert json.loads(run(capsys, "env", "--json")[1])["kernel_backend"] == "reference"
    _, text, _ = run(capsys, "env")
    assert machine["processor"] in text


LIBRARIES = {"torch", "numpy", "fastapi", "pydantic", "jinja2", "rich", "aiohttp", "tokenizers", "starlette", "asyncio"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("from pelton.cli.main import main; main(['serve', '--help'])", {"asyncio", "rich"}),
        ("import pelton.cli.main, pelton.cli.serve, pelton.weights.catalog, pelton.weights.model_files", {"asyncio"}),
        (
            "import pelton.serving.server, pelton.serving.app, pelton.weights.tokenizer.gguf_metadata",
            {"asyncio", "starlette", "tokenizers"},
        ),
        ("import pelton.cli.engine_process, pelton.engine.loop, pelton.weights.tokenizer", set()),
        ("import pelton.llm", {"asyncio"}),
    ],
    ids=["help", "command line", "API process", "engine process", "LLM"],
)
def test_each_process_imports_only_what_it_needs(code: str, allowed: set[str]) -> None:
    """Every one of these libraries costs a tenth of the time to the first token, torch all of it."""
    code = f"import sys; {code}; sys.exit(' '.join({LIBRARIES - allowed} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_connectors_are_imported_where_they_are_used() -> None:
    code = (
        "import sys, pelton.build, pelton.cli.engine_process, pelton.engine.engine, pelton.engine.kv.manager\n"
        "names = ('pelton.cluster.transfer', 'pelton.engine.kv.transfer', 'pelton.engine.kv.peer_wait')\n"
        "sys.exit(' '.join(name for name in sys.modules if name.startswith(names)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m pelton.cli.main serve --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_interrupt_is_exit_code_130() -> None:
    command = [sys.executable, "-m", "pelton.cli.main", "chat", "--base-url", "http://127.0.0.1:9", "--model", "m"]
    # A shell without job control starts its background jobs, this one's parent maybe, with the signal ignored.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(0.6)  # it waits for its standard input
        process.send_signal(2)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err
