import json
from pathlib import Path

import pytest

from pelton.cli.generate import Task, read_tasks
from pelton.core.errors import ConfigError
from tests.cli.run import pelton

HELLO = [{"role": "user", "content": "hello"}]


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_prompts_and_messages(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a", "id": 7}', "", json.dumps({"messages": HELLO}))
    first, second = read_tasks(path)
    assert (first.to_prompt(), first.row) == ("a", {"prompt": "a", "id": 7})
    assert second.to_prompt() == HELLO


def test_a_text_becomes_a_message_with_chat() -> None:
    assert Task("hello", chat=True).to_prompt() == HELLO


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 must be an object"),
        ('{"prompt": 1}', "line 2 must be an object"),
        ('{"messages": []}', "line 2 must be an object"),
        ('{"messages": ["x"]}', "line 2 must be an object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tasks(write(tmp_path, '{"prompt": "a"}', line))


def test_no_prompt_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no prompt in it"):
        read_tasks(write(tmp_path, "", " "))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--temperature 300", 1, "temperature is 300.0; it must be between"),
        ("--input /no/such.jsonl", 2, "/no/such.jsonl: cannot be read: No such file"),
        ("--input x --prompt y", 2, "--prompt and --input exclude each other"),
        ("--output x --prompt y", 2, "--output goes with --input"),
        ("/no/such/model.gguf --prompt y", 1, "no model at /no/such/model.gguf"),
    ],
)
async def test_wrong_calls(arguments: str, code: int, message: str) -> None:
    result = await pelton("generate", *arguments.split())
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"pelton: {message}")


@pytest.mark.model
async def test_a_prompt_from_a_pipe(default_model_path: Path) -> None:
    arguments = ("--temperature", "0", "--max-tokens", "6", "--num-kv-blocks", "64")
    result = await pelton("generate", str(default_model_path), *arguments, stdin="The capital of France is")
    assert result.code == 0, result.err
    assert result.out.startswith(" Paris")


@pytest.mark.model
async def test_a_file_of_prompts(default_model_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "The capital of France is", "id": "x"}, {"prompt": "word " * 2000}, {"messages": HELLO}]
    path = write(tmp_path, *map(json.dumps, rows))
    output = tmp_path / "out.jsonl"
    arguments = ("--temperature", "0", "--max-tokens", "6", "--num-kv-blocks", "64", "--output", str(output))
    result = await pelton("generate", str(default_model_path), "--input", str(path), *arguments)
    first, second, third = map(json.loads, output.read_text().splitlines())
    assert (first["id"], first["finish_reason"], first["num_output_tokens"]) == ("x", "length", 6)
    assert first["text"].startswith(" Paris")
    assert second["error"]["code"] == "context_length_exceeded"
    assert "Hello" in third["text"]
    assert result.code == 1  # one of them failed
    assert result.err.endswith('1 of 3 prompts failed; see their "error"\n')
