"""Coverage-guided fuzzing of all that reads what strangers send: `make fuzz`, or with arguments of libFuzzer

    python -m tests.fuzz.decoders -max_total_time=600 FOLDER_OF_INPUTS

The first byte of an input chooses the reader. Typed errors are answers; anything else that is raised is a bug, and
so is an input that takes more than five seconds or 2 GiB.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType

import atheris
import numpy as np
import safetensors.numpy as safetensors_numpy
from starlette.datastructures import Headers
from starlette.requests import Request

from pelton.core.api_key import is_secret, split_key
from pelton.core.errors import PeltonError
from pelton.core.tenant import parse_tenants
from pelton.serving.anthropic.chat import chat_request as anthropic_chat_request
from pelton.serving.anthropic.requests import MessageRequest
from pelton.serving.anthropic.requests import check_kinds as check_message_kinds
from pelton.serving.openai.messages import template_messages
from pelton.serving.openai.requests import ChatRequest, CompletionRequest, check_supported
from pelton.serving.openai.responses_api.chat import chat_request
from pelton.serving.openai.responses_api.items import input_items
from pelton.serving.openai.responses_api.listing import listed_items
from pelton.serving.openai.responses_api.requests import ResponseRequest
from pelton.serving.openai.responses_api.requests import check_kinds as check_response_kinds
from pelton.serving.openai.sampling import chat_sampling, completion_sampling
from pelton.serving.openai.stored_chat.objects import CompletionsQuery
from pelton.serving.openai.token_requests import TokenizeRequest
from pelton.serving.parsing.answer import AnswerPlan, ParsedAnswer
from pelton.serving.query import read_query
from pelton.serving.reasoning import REASONING_FORMATS
from pelton.serving.request_body import decode_json
from pelton.serving.tenants.access import AccessControl
from pelton.serving.tenants.admin_types import NewKeyRequest, TenantChanges, UsageQuery
from pelton.serving.tenants.journal import read_journal
from pelton.serving.tools import TOOL_CALL_FORMATS
from pelton.store.config import StoreConfig
from pelton.weights.dequantize import dequantize
from pelton.weights.gguf.reader import read_gguf
from pelton.weights.lora import open_adapter
from pelton.weights.model_files import open_model
from pelton.weights.safetensors import SafetensorsFile
from pelton.weights.tensors import GenerationDefaults
from tests.serving.test_tool_formats import CASES, NAMES
from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_folder, write_gguf

DEFAULTS = GenerationDefaults()
MAX_LORA_RANK = 64
_folder = Path(tempfile.mkdtemp(prefix="pelton-fuzz-"))
_file = _folder / "journal"


def chat(data: bytes) -> None:
    request = decode_json(data, ChatRequest)
    check_supported(request)
    chat_sampling(request, DEFAULTS)
    template_messages(request.messages)


def completion(data: bytes) -> None:
    request = decode_json(data, CompletionRequest)
    check_supported(request)
    completion_sampling(request, DEFAULTS)


def other_bodies(data: bytes) -> None:
    for kind in (TokenizeRequest, NewKeyRequest, TenantChanges):
        with contextlib.suppress(PeltonError):
            decode_json(data, kind)


def query(data: bytes) -> None:
    request = Request({"type": "http", "query_string": data, "headers": []})
    with contextlib.suppress(PeltonError):
        read_query(request, UsageQuery)
    read_query(request, CompletionsQuery, maps=("metadata",))


def response(data: bytes) -> None:
    request = decode_json(data, ResponseRequest, check_response_kinds)
    check_supported(request)
    own = input_items(request.input)
    listed_items(own, "resp_x", limit=20, after=None, descending=True)
    chat_sampling(chat_request(request, [], own), DEFAULTS)


def message(data: bytes) -> None:
    request = decode_json(data, MessageRequest, check_message_kinds)
    check_supported(request)
    template_messages(anthropic_chat_request(request).messages)


def tool_calls(data: bytes) -> None:
    """The first byte chooses the format, the second how the text is cut: what is read must not depend on it."""
    formats = tuple(TOOL_CALL_FORMATS.values())
    if len(data) > 1:
        reads = formats[data[0] % len(formats)].reader(NAMES, starts_only=data[0] > 127)
        _read_whole_and_cut(AnswerPlan(answer=reads, make_call_id=lambda: "id"), data[1:])


def reasoning(data: bytes) -> None:
    formats = tuple(REASONING_FORMATS.values())
    if len(data) > 1:
        reads = formats[data[0] % len(formats)].reader(is_open=data[0] > 127)
        _read_whole_and_cut(AnswerPlan(reasoning=reads, make_call_id=lambda: "id"), data[1:])


def _read_whole_and_cut(plan: AnswerPlan, data: bytes) -> None:
    size, text = data[0] % 7 + 1, data[1:].decode("utf-8", "replace")
    found = []
    for pieces in ([text], [text[start : start + size] for start in range(0, len(text), size)]):
        parser, answer = plan.make_parser(), ParsedAnswer()
        for piece in pieces:
            answer.add(parser.push(piece))
        answer.add(parser.finish())
        found.append(answer)
    assert found[0] == found[1], f"cut into {size}: {found[1]}, whole: {found[0]}"


def gguf_file(data: bytes) -> None:
    path = _folder / "model.gguf"
    path.write_bytes(data)
    file = read_gguf(path)
    for name in file.tensors:
        file.tensor_data(name)


def safetensors_file(data: bytes) -> None:
    path = _folder / "model.safetensors"
    path.write_bytes(data)
    file = SafetensorsFile(path)
    for name in file.tensors:
        dequantize(file.tensor(name), num_threads=1)


def lora(data: bytes) -> None:
    """Weights, or, behind a first byte that is odd, the configuration beside weights that are good."""
    if data:
        name = "adapter_config.json" if data[0] % 2 else "adapter_model.safetensors"
        (_adapter / name).write_bytes(data[1:])
        try:
            open_adapter(_adapter, _spec, MAX_LORA_RANK)
        finally:
            (_adapter / name).write_bytes(_adapter_files[name])


def key(data: bytes) -> None:
    text = data.decode("latin-1")
    split_key(text)
    is_secret(text, "0" * 64)
    headers = Headers(raw=[(b"authorization", data), (b"x-api-key", data)])
    AccessControl("secret", None).identify(headers, "/v1/models", "GET")


def settings(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(PeltonError):
        parse_tenants([text])
    StoreConfig(database_url=text)


def journal(data: bytes) -> None:
    _file.write_bytes(data)
    read_journal(_file)


def _write_models() -> tuple[bytes, bytes, dict[str, bytes]]:
    """Of a tiny model: a GGUF file, a safetensors file, an adapter's files."""
    config = TINY_CONFIGS["llama"]
    tensors = random_tensors(config)
    write_folder(_folder / "tiny", config, tensors)
    few = {name: values for name, values in tensors.items() if name.endswith("layers.0.input_layernorm.weight")}
    gguf_bytes = write_gguf(_folder / "tiny.gguf", config, few).read_bytes()
    spec = open_model(_folder / "tiny").spec
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    sides = {
        f"{name}A.weight": np.ones((2, spec.hidden_size), np.float32),
        f"{name}B.weight": np.ones((spec.num_heads * spec.head_dim, 2), np.float32),
    }
    adapter_config = b'{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"],"bias":"none"}'
    files = {"adapter_config.json": adapter_config, "adapter_model.safetensors": safetensors_numpy.save(sides)}
    return gguf_bytes, safetensors_numpy.save({"a": np.ones((3, 2), np.float32), "b": np.ones(4, np.float16)}), files


_gguf_file, _safetensors_file, _adapter_files = _write_models()
_spec = open_model(_folder / "tiny").spec
_adapter = _folder / "adapter"
_adapter.mkdir()
for _name, _content in _adapter_files.items():
    (_adapter / _name).write_bytes(_content)

Reader = Callable[[bytes], None]
# Appended to only: the place of a reader is the first byte of its inputs.
SEEDS: dict[Reader, Sequence[bytes]] = {
    chat: [
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"n":2,"stop":["a"],"logit_bias":{"1":2}}',
        b'{"messages":[{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"f","arguments":"{}"}}]},'
        b'{"role":"tool","tool_call_id":"c","content":"x"}],"tools":[{"function":{"name":"f"}}],"store":true}',
    ],
    completion: [
        b'{"prompt":[[1,2],[3]],"max_tokens":0,"echo":true,"seed":-1,"stream_options":{"include_usage":true}}'
    ],
    other_bodies: [b'{"tenant_id":"a","scopes":["admin"],"expires_in_s":1e3,"weight":2.5,"cache_group":null}'],
    query: [b"start_time=1&group_by=tenant,key&tenant_id=a%20b", b"metadata[a]=b&limit=3&order=desc"],
    key: [b"Bearer plt_0123456789abcdef_secret"],
    settings: [b"a:weight=2,max_num_running=3"],
    journal: [b'8b1a9953 [3600,"run",[10,1],[["acme","k",1,10,0,1]]]\n'],
    response: [
        b'{"input":[{"type":"reasoning","summary":[],"encrypted_content":"dGg="},{"type":"function_call","call_id":"c",'
        b'"name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":[{"type":"input_text",'
        b'"text":"x"}]},{"type":"compaction","encrypted_content":"YQ=="}],"tools":[{"type":"function","name":"f",'
        b'"parameters":{"type":"object"}}],"text":{"format":{"type":"json_schema","name":"a","schema":{}}}}',
        b'{"input":"a","instructions":"b","tool_choice":{"type":"allowed_tools","mode":"auto","tools":[]}}',
    ],
    message: [
        b'{"max_tokens":9,"system":[{"type":"text","text":"s"}],"messages":[{"role":"user","content":"a"},'
        b'{"role":"assistant","content":[{"type":"thinking","thinking":"t","signature":"x"},{"type":"tool_use",'
        b'"id":"t","name":"f","input":{}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"t",'
        b'"content":"r"}]}],"tools":[{"name":"f","input_schema":{"type":"object"}}],"thinking":{"type":"disabled"}}'
    ],
    tool_calls: [bytes([list(TOOL_CALL_FORMATS).index(name), 3]) + text.encode() for name, text, _, _ in CASES],
    reasoning: [
        bytes([index, 2]) + text.encode()
        for index in range(len(REASONING_FORMATS))
        for text in ("<think>\na</think>\n\nb", "[THINK]a[/THINK]b", "<|channel|>analysis<|message|>a<|end|>")
    ],
    gguf_file: [_gguf_file],
    safetensors_file: [_safetensors_file],
    lora: [b"\0" + _adapter_files["adapter_model.safetensors"], b"\1" + _adapter_files["adapter_config.json"]],
}
READERS: tuple[Reader, ...] = tuple(SEEDS)


def read_one(data: bytes) -> None:
    if data:
        with contextlib.suppress(PeltonError):
            READERS[data[0] % len(READERS)](data[1:])


def _instrument() -> None:
    """All functions of ours. `atheris.instrument_imports` says that it does, and none of them counts."""
    for found in gc.get_objects():
        if isinstance(found, FunctionType) and (found.__module__ or "").startswith("pelton."):
            atheris.instrument_func(found)


def main() -> None:
    _instrument()
    folder = Path(tempfile.mkdtemp(prefix="pelton-seeds-"))
    for number, seeds in enumerate(SEEDS.values()):
        for index, seed in enumerate(seeds):
            (folder / f"{number}-{index}").write_bytes(bytes([number]) + seed)
    own = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    # libFuzzer writes what it finds into the first folder.
    atheris.Setup(
        [sys.argv[0], "-timeout=5", "-rss_limit_mb=2048", "-max_len=16384", *flags, *(own or [str(folder)])], read_one
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
