"""What every handler shares: the engine's client, the tokenizer, the template, the settings."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.metadata import version
from typing import TypeVar

from pelton.core.errors import (
    ContextLengthExceededError,
    ModelNotFoundError,
    QueueFullError,
    ServiceUnavailableError,
)
from pelton.core.events import EngineInfo
from pelton.core.grammar import Grammar
from pelton.core.request import Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.client import EngineClient, EngineState
from pelton.serving.batches.runner import BatchRunner
from pelton.serving.caller import Caller
from pelton.serving.config import ServerConfig
from pelton.serving.dialect import Dialect
from pelton.serving.generation import Generation
from pelton.serving.grammar.checker import GrammarChecker
from pelton.serving.lora_metrics import LoraMetrics
from pelton.serving.metrics import ServerMetrics
from pelton.serving.openai.logprobs import TokenSpelling
from pelton.serving.openai.pooling_requests import PoolingRequest
from pelton.serving.openai.requests import GenerationRequest
from pelton.serving.openai.responses_api.service import ResponseService
from pelton.serving.openai.stored_chat.archive import CompletionArchive
from pelton.serving.template_process import TemplateRenderer
from pelton.serving.tenants.service import TenantService
from pelton.serving.timelines import Timelines, new_timeline
from pelton.store.opener import Store
from pelton.weights.tensors import GenerationDefaults
from pelton.weights.tokenizer import Tokenizer

PELTON_VERSION = version("pelton")
NUM_PREPARE_THREADS = 2
MAX_PREPARING = 256
PIECE_CHARS = 1 << 18
CUT_SLACK_TOKENS = 64
UNAVAILABLE_RETRY_S = 2.0
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The model behind the server. `names` are those that clients may use; answers carry the first."""

    names: tuple[str, ...]
    root: str  # what was asked for: a catalog name, a folder, a file
    max_model_len: int  # the model's own; the engine's may be smaller
    created: int
    pooling: str = "last"  # of embeddings, where a request does not say


@dataclass(slots=True, kw_only=True, eq=False)
class ServingContext:
    client: EngineClient
    tokenizer: Tokenizer
    model: ModelCard
    config: ServerConfig
    template: TemplateRenderer | None
    dialect: Dialect
    defaults: GenerationDefaults
    metrics: ServerMetrics
    lora_metrics: LoraMetrics
    timelines: Timelines
    spelling: TokenSpelling
    pool: ThreadPoolExecutor
    responses: ResponseService
    archive: CompletionArchive
    spelling_of_ids: TokenSpelling
    tenants: TenantService
    store: Store  # of what outlives the process; opened at first use
    grammars: GrammarChecker | None = None  # made on first use
    num_preparing: int = 0
    batches: BatchRunner = field(init=False)  # which needs the context itself

    def check_ready(self) -> EngineInfo:
        """Raises `ServiceUnavailableError` unless the engine takes requests."""
        if self.tenants.access.is_loading:
            raise ServiceUnavailableError("the server is reading its keys; try again later")
        if self.client.state is not EngineState.READY or self.client.info is None:
            raise ServiceUnavailableError(
                f"the server is {self.client.state}; try again later", retry_after_s=UNAVAILABLE_RETRY_S
            )
        return self.client.info

    def check_model(self, name: str | None) -> None:
        """Raises `ModelNotFoundError` unless it is the model's or an adapter's."""
        if name is not None and name not in self.model.names and name not in self.client.adapters:
            served = ", ".join((*self.model.names, *self.client.adapters))
            raise ModelNotFoundError(f"the model {name!r} is not served here; served: {served}")

    def lora_id(self, name: str | None) -> str:
        """Of the adapter that goes by `name`; empty for the model's own. Raises `ModelNotFoundError`."""
        self.check_model(name)  # again: it may have been unloaded since the request came
        return "" if name is None or name in self.model.names else self.client.adapters[name].lora_id

    def fingerprint(self, name: str | None) -> str:
        """`system_fingerprint`: the same while model, adapter, kernels, types and version are."""
        info = self.check_ready()
        facts = (info.kv_identity, info.kernels, info.dtype, info.device, info.vocab_size, self.lora_id(name))
        return f"fp_{blake2b(repr((PELTON_VERSION, *facts)).encode(), digest_size=6).hexdigest()}"

    @property
    def max_model_len(self) -> int:
        return self.client.info.max_model_len if self.client.info is not None else self.model.max_model_len

    async def prepare(self, function: Callable[..., ResultT], *args: object) -> ResultT:
        """Run templates and tokenization away from the event loop; the backlog is bounded."""
        if self.num_preparing >= MAX_PREPARING:
            raise QueueFullError(f"{self.num_preparing} requests are being tokenized; try again later")
        self.num_preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        finally:
            self.num_preparing -= 1

    async def check_grammar(self, grammar: Grammar, param: str) -> Grammar:
        """As `GrammarChecker.check`."""
        if self.grammars is None:
            self.grammars = GrammarChecker(self.tokenizer, self.check_ready().vocab_size)
        return await self.grammars.check(grammar, param)

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of `text`; a text far beyond the context is refused after its first pieces."""
        num_tokens = 0
        if len(text) > PIECE_CHARS:
            for start in range(0, len(text), PIECE_CHARS):
                piece = text[start : start + PIECE_CHARS]
                # A cut may split tokens in two, so each piece counts for a little less.
                num_tokens += len(self.tokenizer.encode(piece, add_special_tokens=False)) - CUT_SLACK_TOKENS
                if num_tokens > self.max_model_len:
                    raise ContextLengthExceededError(
                        f"the prompt has more than {num_tokens} tokens, but the context holds {self.max_model_len}",
                        param=param,
                    )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def submit(
        self,
        answer_id: str,
        prompts: Sequence[list[int]],
        request: GenerationRequest | PoolingRequest,
        sampling: SamplingParams,
        caller: Caller,
        tool_names: tuple[str, ...] = (),
    ) -> Generation:
        """One submission per prompt, all or none. Raises `LimitError` where the tenant's limits are in the way."""
        lora_id = self.lora_id(request.model)
        ticket = self.tenants.admit(caller.tenant_id, caller.key_id, prompts, sampling)
        if ticket is not None and ticket.reservation is not None:
            caller.response_headers.update(ticket.reservation.headers)
        timeout_s = request.timeout_s or self.config.request_timeout_s or None
        streams = ticket.streams if ticket is not None else []
        submission_id = answer_id
        try:
            for index, prompt in enumerate(prompts):
                submission_id = answer_id if len(prompts) == 1 else f"{answer_id}-{index}"
                submission = Submission(
                    request_id=submission_id,
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    tenant_id=caller.tenant_id,
                    session_id=caller.session_id,
                    program_id=caller.program_id,
                    previous_request_id=caller.previous_answer_id,
                    tool_names=tool_names,
                    cache_salt=caller.salt(request.cache_salt, self.tenants.cache_group(caller.tenant_id)),
                    lora_id=lora_id,
                    priority=request.priority,
                    is_background=caller.is_background,
                    timeout_s=timeout_s,
                )
                self.tenants.begin(ticket, submission_id, len(prompt), sampling.n)
                streams.append(self.client.submit(submission))
                self.metrics.observe_parameters(sampling)
        except BaseException:
            self.tenants.drop(ticket, submission_id)
            for stream in streams:
                stream.cancel()
            raise
        if lora_id and request.model is not None:
            for stream in streams:
                self.lora_metrics.begin(request.model, stream.request_id, sampling.n)
        timeline = new_timeline(answer_id, caller.request_id, caller.session_id, caller.program_id)
        self.timelines.begin(caller.tenant_id, timeline, [stream.request_id for stream in streams], sampling.n)
        generation = Generation(streams, self.metrics.observe_gap)
        caller.log["num_prompt_tokens"] = sum(map(len, prompts))
        caller.log["num_output_tokens"] = lambda: generation.num_output_tokens
        return generation


def new_answer_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now_unix_s() -> int:
    return int(time.time())
