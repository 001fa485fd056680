"""Coverage-guided fuzzing of all that reads what strangers send: `make fuzz`, or with arguments of libFuzzer

    python -m tests.fuzz.decoders -max_total_time=600 FOLDER_OF_INPUTS

The first byte of an input chooses the reader. Typed errors are answers; anything else that is raised is a bug, and
so is an input that takes more than five seconds or 2 GiB.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pelton"]):
    from pelton.core.api_key import is_secret, split_key
    from pelton.core.errors import PeltonError
    from pelton.core.tenant import parse_tenants
    from pelton.serving.openai.messages import template_messages
    from pelton.serving.openai.requests import ChatRequest, CompletionRequest, TokenizeRequest, check_supported
    from pelton.serving.openai.sampling import chat_sampling, completion_sampling
    from pelton.serving.query import read_query
    from pelton.serving.request_body import decode_json
    from pelton.serving.tenants.access import AccessControl
    from pelton.serving.tenants.admin_types import NewKeyRequest, TenantChanges, UsageQuery
    from pelton.serving.tenants.journal import read_journal
    from pelton.store.config import StoreConfig
    from pelton.weights.tensors import GenerationDefaults

from starlette.datastructures import Headers
from starlette.requests import Request

DEFAULTS = GenerationDefaults()
_file = Path(tempfile.mkdtemp(prefix="pelton-fuzz-")) / "journal"


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
    read_query(Request({"type": "http", "query_string": data, "headers": []}), UsageQuery)


def key(data: bytes) -> None:
    text = data.decode("latin-1")
    split_key(text)
    is_secret(text, "0" * 64)
    headers = Headers(raw=[(b"authorization", data), (b"x-api-key", data)])
    AccessControl("secret", None).identify(headers, "/v1/models")


def settings(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(PeltonError):
        parse_tenants([text])
    StoreConfig(database_url=text)


def journal(data: bytes) -> None:
    _file.write_bytes(data)
    read_journal(_file)


READERS: tuple[Callable[[bytes], None], ...] = (chat, completion, other_bodies, query, key, settings, journal)
SEEDS = (
    b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"n":2,"stop":["a"],"logit_bias":{"1":2}}',
    b'{"prompt":[[1,2],[3]],"max_tokens":0,"echo":true,"seed":-1,"stream_options":{"include_usage":true}}',
    b'{"tenant_id":"a","scopes":["admin"],"expires_in_s":1e3,"weight":2.5,"cache_group":null}',
    b"start_time=1&group_by=tenant,key&tenant_id=a%20b",
    b"Bearer plt_0123456789abcdef_secret",
    b"a:weight=2,max_num_running=3",
    b'8b1a9953 [3600,"run",[10,1],[["acme","k",1,10,0,1]]]\n',
)


def read_one(data: bytes) -> None:
    if data:
        with contextlib.suppress(PeltonError):
            READERS[data[0] % len(READERS)](data[1:])


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="pelton-seeds-"))
    for number, seed in enumerate(SEEDS):
        (folder / str(number)).write_bytes(bytes([number]) + seed)
    own = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    # libFuzzer writes what it finds into the first folder.
    atheris.Setup([sys.argv[0], "-timeout=5", "-rss_limit_mb=2048", *flags, *(own or [str(folder)])], read_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
