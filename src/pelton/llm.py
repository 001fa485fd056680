"""`LLM`: Pelton as a Python class, without a server. The same engine, settings and answers."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from pelton.build import PeltonConfig, build_thread_client, read_chat_template
from pelton.core.errors import InvalidRequestError, ModelNotFoundError, PeltonError
from pelton.core.events import EngineStats
from pelton.core.lora import LoraAdapter
from pelton.core.output import RequestOutput, TokenLogprobs
from pelton.core.request import FinishReason, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.engine.client import EngineClient, RequestStream
from pelton.serving.template_error import Message
from pelton.weights.catalog import resolve_model
from pelton.weights.config import DEFAULT_MODEL
from pelton.weights.model_files import open_model
from pelton.weights.tensors import GenerationDefaults
from pelton.weights.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pelton.serving.chat_template import ChatTemplate
    from pelton.weights.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Conversation = Sequence[Message]
# The name of an adapter for all prompts, or one (or none) for each.
Lora = str | Sequence[str | None] | None

# Without sampling parameters an answer ends here at the latest.
DEFAULT_MAX_TOKENS = 256


@dataclass(slots=True)
class GeneratedSequence:
    """One of n answers."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class Generation:
    """What became of one prompt. `text` is the first sequence's."""

    prompt_token_ids: list[int]
    sequences: list[GeneratedSequence]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def text(self) -> str:
        return self.sequences[0].text

    def _take(self, output: RequestOutput) -> None:
        sequence = self.sequences[output.index]
        sequence.text += output.text
        sequence.token_ids += output.token_ids
        if output.logprobs is not None:
            sequence.logprobs = [*(sequence.logprobs or ()), *output.logprobs]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [*(self.prompt_logprobs or ()), *output.prompt_logprobs]
        if output.finish_reason is not None:
            sequence.finish_reason = output.finish_reason
            sequence.stop_reason = output.stop_reason
        if output.usage is not None:
            self.num_cached_tokens = max(self.num_cached_tokens, output.usage.num_cached_tokens)


class LLM:
    """A model in this process.

    >>> with LLM() as llm:
    ...     print(llm.generate("def fibonacci(n):", SamplingParams(temperature=0, max_tokens=32))[0].text)

    `model` and the keyword arguments are settings as `pelton serve` has them, spelled with underscores.
    Thread-safe: calls from several threads share the engine's batches.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        config = PeltonConfig.of({"model": model, **settings})
        path = resolve_model(config.model)
        files = open_model(path)
        self.tokenizer = load_tokenizer(path, config.model.tokenizer, files)
        self.default_sampling = _default_sampling(files.generation_defaults)
        source = read_chat_template(config.server.chat_template) or files.chat_template
        self._template = _make_template(source, self.tokenizer) if source is not None else None
        self._ids = itertools.count()
        self._event_loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._event_loop.run_forever, name="pelton-llm", daemon=True)
        self._thread.start()
        self._client: EngineClient | None = build_thread_client(config, self.tokenizer)
        try:
            self._run(self._client.start()).result()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Lora = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Complete one prompt or many, all in one batch; answers in the order of the prompts.

        A prompt is text or token ids. `sampling` is for all of them, or one for each, and so is `lora`, the name
        of an adapter. Raises the first typed error; the other prompts are then cancelled.
        """
        all_prompts = [prompts] if _is_prompt(prompts) else cast("Sequence[Prompt]", prompts)
        samplings = self._samplings(sampling, len(all_prompts))
        all_ids = [self._token_ids(prompt) for prompt in all_prompts]
        return self._generate(all_ids, samplings, lora, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: Lora = None,
        progress: bool = False,
        **template_options: Any,
    ) -> list[Generation]:
        """Answer one conversation (a list of messages with `role` and `content`) or many."""
        one = _is_conversation(conversations)
        all_conversations = cast("Sequence[Conversation]", [conversations] if one else conversations)
        samplings = self._samplings(sampling, len(all_conversations))
        all_ids = [self._chat_token_ids(conversation, template_options) for conversation in all_conversations]
        return self._generate(all_ids, samplings, lora, progress)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling: SamplingParams | None = None,
        *,
        lora: str | None = None,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """The deltas of one prompt or conversation as they come. Leaving the loop early cancels the request."""
        if _is_conversation(prompt):
            token_ids = self._chat_token_ids(prompt, template_options)
        else:
            token_ids = self._token_ids(cast("Prompt", prompt))
        deltas: queue.SimpleQueue[list[RequestOutput] | PeltonError | None] = queue.SimpleQueue()
        submission = self._submission(token_ids, sampling or self.default_sampling)
        task = self._run(self._pump(submission, lora, deltas))
        try:
            while (delta := deltas.get()) is not None:
                if isinstance(delta, PeltonError):
                    raise delta
                yield from delta
        finally:
            task.cancel()

    def load_adapter(self, name: str, path: str, *, replace: bool = False) -> LoraAdapter:
        """Load a LoRA adapter, to be asked for as `lora=name`; `replace` takes the name from the one that has it."""
        assert self._client is not None
        adapter: LoraAdapter = self._run(self._client.adapters.load(name, path, replace=replace)).result()
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Prompts that are being completed with it go on."""
        assert self._client is not None
        self._run(self._client.adapters.unload(name)).result()

    @property
    def stats(self) -> EngineStats:
        """The engine's counters and gauges, as of its last step."""
        return self._client.stats if self._client is not None else EngineStats()

    def close(self) -> None:
        """Cancel what runs and free the model. Idempotent; also done on leaving a `with` block."""
        client, self._client = self._client, None
        if client is not None:
            asyncio.run_coroutine_threadsafe(client.close(), self._event_loop).result()
            self._event_loop.call_soon_threadsafe(self._event_loop.stop)
            self._thread.join()
            self._event_loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- on the caller's thread -------------------------------------------------------------------

    def _token_ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _chat_token_ids(self, conversation: Conversation, template_options: Mapping[str, Any]) -> list[int]:
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; give one with chat_template=FILE")
        text = self._template.render(conversation, **template_options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _samplings(
        self, sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling is None:
            sampling = self.default_sampling
        samplings = [sampling] * num_prompts if isinstance(sampling, SamplingParams) else list(sampling)
        if len(samplings) != num_prompts:
            raise InvalidRequestError(f"there are {num_prompts} prompts but {len(samplings)} sampling parameters")
        return samplings

    def _submission(self, token_ids: list[int], sampling: SamplingParams) -> Submission:
        if sampling.grammar is not None:
            from pelton.serving.grammar.check import check_without_vocabulary

            sampling = replace(sampling, grammar=check_without_vocabulary(sampling.grammar))
        return Submission(request_id=f"llm-{next(self._ids)}", prompt_token_ids=token_ids, sampling=sampling)

    def _generate(
        self, all_ids: Sequence[list[int]], samplings: Sequence[SamplingParams], lora: Lora, progress: bool
    ) -> list[Generation]:
        loras = [lora] * len(all_ids) if lora is None or isinstance(lora, str) else list(lora)
        if len(loras) != len(all_ids):
            raise InvalidRequestError(f"there are {len(all_ids)} prompts but {len(loras)} adapters")
        submissions = [self._submission(ids, sampling) for ids, sampling in zip(all_ids, samplings, strict=True)]
        with _ProgressBar(len(submissions)) if progress else _NoProgress() as bar:
            task = self._run(self._collect_all(submissions, loras, bar))
            try:
                generations: list[Generation] = task.result()
                return generations
            except BaseException:
                task.cancel()
                raise

    def _run(self, coroutine: Any) -> Future[Any]:
        if self._client is None:
            coroutine.close()
            raise PeltonError("this LLM is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._event_loop)

    # -- on the event loop ------------------------------------------------------------------------

    async def _collect_all(
        self, submissions: Sequence[Submission], loras: Sequence[str | None], bar: _NoProgress
    ) -> list[Generation]:
        assert self._client is not None
        assert self._client.info is not None
        # As many as the engine runs and as many again waiting: never more than its bounded queue takes.
        info = self._client.info
        room = asyncio.Semaphore(info.max_num_seqs + min(info.max_num_seqs, info.max_num_waiting))
        tasks = [
            asyncio.create_task(self._collect(submission, lora, room, bar))
            for submission, lora in zip(submissions, loras, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _submit(self, submission: Submission, lora: str | None) -> RequestStream:
        """Raises `ModelNotFoundError` for an adapter that is not, or no longer, loaded."""
        assert self._client is not None
        if lora is not None:
            adapter = self._client.adapters.get(lora)
            if adapter is None:
                raise ModelNotFoundError(f"no adapter {lora!r} is loaded")
            submission = replace(submission, lora_id=adapter.lora_id)
        return self._client.submit(submission)

    async def _collect(
        self, submission: Submission, lora: str | None, room: asyncio.Semaphore, bar: _NoProgress
    ) -> Generation:
        sequences = [GeneratedSequence(index) for index in range(submission.sampling.n)]
        generation = Generation(submission.prompt_token_ids, sequences)
        async with room:
            stream = self._submit(submission, lora)
            try:
                async for outputs in stream:
                    for output in outputs:
                        generation._take(output)
                        bar.count_tokens(len(output.token_ids))
            finally:
                stream.cancel()
        bar.count_prompt()
        return generation

    async def _pump(
        self,
        submission: Submission,
        lora: str | None,
        deltas: queue.SimpleQueue[list[RequestOutput] | PeltonError | None],
    ) -> None:
        try:
            stream = self._submit(submission, lora)
            try:
                async for outputs in stream:
                    deltas.put(outputs)
            finally:
                stream.cancel()
            deltas.put(None)
        except PeltonError as error:
            deltas.put(error)


class _NoProgress:
    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *_: object) -> None: ...

    def count_tokens(self, num_tokens: int) -> None: ...

    def count_prompt(self) -> None: ...


class _ProgressBar(_NoProgress):
    """Prompts done, output tokens and their rate, on standard error."""

    def __init__(self, num_prompts: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[num_tokens]} tokens"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("prompts", total=num_prompts, num_tokens=0)
        self._num_tokens = 0

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def count_tokens(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._progress.update(self._task, num_tokens=self._num_tokens)

    def count_prompt(self) -> None:
        self._progress.advance(self._task)


def _make_template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    from pelton.serving.chat_template import ChatTemplate

    return ChatTemplate(source, {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")})


def _default_sampling(defaults: GenerationDefaults) -> SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    known = {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}
    return SamplingParams(max_tokens=DEFAULT_MAX_TOKENS, **known)


def _is_prompt(value: object) -> TypeGuard[Prompt]:
    return isinstance(value, str) or (isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], int))


def _is_conversation(value: object) -> TypeGuard[Conversation]:
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)
