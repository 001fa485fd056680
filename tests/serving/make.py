"""A real engine over a scripted executor, and a real server over it; none of it needs torch."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import uvicorn

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.output import TokenLogprobs
from pelton.core.pooling import PoolingParams
from pelton.engine.client import EngineClient
from pelton.engine.thread import ThreadTransport
from pelton.serving.app import create_app
from pelton.serving.config import ServerConfig
from pelton.serving.context import ModelCard
from pelton.serving.middleware import with_server_send
from pelton.serving.server import listen, uvicorn_config
from pelton.store.config import StoreConfig
from pelton.store.opener import Store
from pelton.weights.tensors import GenerationDefaults
from tests.make import EOS_TOKEN_ID, VOCAB_SIZE, ByteDecoder, make_engine
from tests.wait import wait_until

MODEL_NAME = "scripted"
ANSWER = "Grüße 😀, the quick brown fox jumps over the lazy dog."
SPECIAL_TOKENS = {EOS_TOKEN_ID: "<|end|>", 257: "<|start|>"}
_SPECIAL_IDS = {text: token_id for token_id, text in SPECIAL_TOKENS.items()}
_ANY_SPECIAL = "|".join(map(re.escape, _SPECIAL_IDS))
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# Shows what it is given: prompts are read back from the executor.
HERMES_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class ByteTokenizer(ByteDecoder):
    """The face of `weights.tokenizer.Tokenizer` over bytes and two special tokens."""

    vocab_size = VOCAB_SIZE
    bos_token = None
    eos_token = SPECIAL_TOKENS[EOS_TOKEN_ID]
    pad_token = None

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        del add_special_tokens, parse_special
        parts = re.split(_ANY_SPECIAL, text)
        specials = [_SPECIAL_IDS[found] for found in re.findall(_ANY_SPECIAL, text)]
        token_ids = list(parts[0].encode())
        for special, part in zip(specials, parts[1:], strict=True):
            token_ids += [special, *part.encode()]
        return token_ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        parts = [
            (b"" if skip_special_tokens else SPECIAL_TOKENS.get(token_id, "").encode())
            if self.is_special(token_id)
            else bytes([token_id])
            for token_id in token_ids
        ]
        return b"".join(parts).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return SPECIAL_TOKENS.get(token_id) or (chr(token_id) if 0 <= token_id < 256 else "")

    def token_id(self, text: str) -> int | None:
        return _SPECIAL_IDS.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL_TOKENS[token_id].encode() if token_id in SPECIAL_TOKENS else super().token_bytes(token_id)


class ScriptedExecutor:
    """Says `answer` whatever it is asked, or with a temperature a text that the seed decides."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.answer = ANSWER
        self.fail_next: Exception | None = None
        self.batches: list[ScheduledBatch] = []
        self._num_outputs: dict[str, int] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._thread = ThreadPoolExecutor(1)

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.batches.append(batch)
        return self._thread.submit(self._execute, batch)

    def close(self) -> None:
        self._thread.shutdown()

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        time.sleep(self.delay_s)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        sampled, logprobs, prompt_logprobs = [], [], []
        pooled: dict[str, bytes] = {}
        for scheduled in batch.requests:
            if scheduled.context is not None:
                self._num_outputs[scheduled.request_id] = len(scheduled.context.output_token_ids)
                self._prompts[scheduled.request_id] = scheduled.context.prompt_token_ids
            sampling = scheduled.sampling
            prompt, start = self._prompts[scheduled.request_id], scheduled.num_computed_tokens
            known = prompt[start + 1 : start + 1 + len(scheduled.token_ids)]
            prompt_logprobs.append(
                tuple(_logprobs(token_id, sampling.prompt_logprobs) for token_id in known)
                if sampling.prompt_logprobs is not None
                else None
            )
            if scheduled.samples and sampling.pooling is not None:
                pooled[scheduled.request_id] = _pool(prompt, sampling.pooling)
            if not scheduled.samples or sampling.pooling is not None:
                sampled.append(())
                logprobs.append(None)
                continue
            token_id = self._next(scheduled.request_id, sampling)
            sampled.append((token_id,))
            entry = _logprobs(token_id, sampling.logprobs or 0)
            if sampling.logprob_token_ids:
                entry = replace(entry, top=tuple((each, -5.0) for each in (token_id, *sampling.logprob_token_ids)))
            logprobs.append((entry,) if sampling.logprobs is not None else None)
        return StepResult(
            batch.step_id, tuple(sampled), tuple(logprobs), tuple(prompt_logprobs), pooled=pooled, elapsed_s=0.001
        )

    def _next(self, request_id: str, sampling: Any) -> int:
        count = self._num_outputs[request_id]
        self._num_outputs[request_id] += 1
        if sampling.logit_bias:
            return max(sampling.logit_bias, key=sampling.logit_bias.__getitem__)
        if not sampling.is_greedy:
            return 97 + (hash((sampling.seed, count)) % 26)
        data = self.answer.encode()
        return data[count] if count < len(data) else EOS_TOKEN_ID


def _pool(prompt: Sequence[int], params: PoolingParams) -> bytes:
    """Counts of the letters a, b, c and of all tokens; of labels their ids over a hundred."""
    values = np.array([prompt.count(97), prompt.count(98), prompt.count(99), len(prompt)], "<f4")
    if params.method == "labels":
        return (np.array(params.label_token_ids, "<f4") / 100).tobytes()
    values = values[: params.dimensions] + (0 if any(values[: params.dimensions or 4]) else 1e-9)
    return (values / np.linalg.norm(values) if params.normalize else values).astype("<f4").tobytes()


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    top = [(token_id, -0.1), *((other, -1.0 - other) for other in range(65, 65 + num_top) if other != token_id)]
    return TokenLogprobs(token_id, -0.1, 1, tuple(top[:num_top]))


@dataclass
class RunningServer:
    url: str
    app: Any
    client: EngineClient
    executor: ScriptedExecutor
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        """Run on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextlib.contextmanager
def running_server(
    *,
    config: ServerConfig | None = None,
    delay_s: float = 0.0,
    chat_template: str | None = TEMPLATE,
    defaults: GenerationDefaults | None = None,
    start_engine: bool = True,
    data_dir: Path | None = None,
    store: StoreConfig | None = None,
    **info: Any,
) -> Iterator[RunningServer]:
    """A server on a free port, on a thread of its own; `info` as in `EngineInfo`. Greedy by default."""
    folder = tempfile.TemporaryDirectory()
    executor = ScriptedExecutor(delay_s=delay_s)
    info = {"max_model_len": 2048, "num_blocks": 4096, "max_num_batched_tokens": 512, "hidden_size": 4} | info
    client = EngineClient(ThreadTransport(lambda: make_engine(executor=executor, **info)), restart=False)
    app = create_app(
        client,
        ByteTokenizer(),  # type: ignore[arg-type]
        ModelCard(names=(MODEL_NAME, "alias"), root=str(Path("scripted")), max_model_len=2048, created=1),
        config or ServerConfig(),
        chat_template=chat_template,
        generation_defaults=defaults or GenerationDefaults(temperature=0.0),
        store=Store(store or StoreConfig(data_dir=str(data_dir or folder.name))),
    )
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(with_server_send(app), config or ServerConfig()))
    started: Future[asyncio.AbstractEventLoop] = Future()

    async def main() -> None:
        if start_engine:
            await client.start()
        started.set_result(asyncio.get_running_loop())
        await server.serve([listener])
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    loop = started.result(30)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        if start_engine:  # keys come from the database when the server runs already
            ready = f"{url}/ready".replace("http:", "https:" if config is not None and config.ssl_certfile else "http:")
            wait_until(lambda: httpx2.get(ready, verify=False).status_code == 200)
        yield RunningServer(url, app, client, executor, loop)
    finally:
        server.should_exit = True
        thread.join(30)
        folder.cleanup()
