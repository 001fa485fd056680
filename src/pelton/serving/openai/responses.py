"""Answers of the OpenAI-compatible endpoints. `UNSET` fields are left out, None ones are sent as null."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReasonName = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct, kw_only=True):
    reasoning_tokens: int = 0


class UsageInfo(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # of a model that reasons


class TopLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    content: list[TokenLogprob]


class CompletionLogprobs(Struct, kw_only=True):
    """One entry per token; None for the first token of an echoed prompt, which nothing predicts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, kw_only=True):
    logprob: float
    rank: int | None
    decoded_token: str


# Per prompt token: token id, as a string, to its logprob; the token itself and the most likely ones.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(Struct, kw_only=True):
    name: str
    arguments: str


class ResponseToolCall(Struct, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatResponseMessage(Struct, kw_only=True):
    """`reasoning` and `reasoning_content` are one thing: clients look for the one or the other."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ResponseToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: ChatResponseMessage
    finish_reason: FinishReasonName
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageInfo
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class StoredChatCompletion(ChatCompletion, kw_only=True):
    """One that was made with `store: true`."""

    metadata: dict[str, str]


class FunctionDelta(Struct, kw_only=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct, kw_only=True):
    """`id`, `type` and the name come with the first delta of a call, and only there."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: UsageInfo | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Struct, kw_only=True):
    """Also the choice of a chunk, whose `finish_reason` is None until the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonName | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: UsageInfo | UnsetType | None = UNSET


class ModelInfo(Struct, kw_only=True):
    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "pelton"
    parent: str | None = None  # of an adapter: the model's name


class ModelList(Struct, kw_only=True):
    data: list[ModelInfo]
    object: Literal["list"] = "list"


class TokenPiece(Struct, kw_only=True):
    id: int
    piece: str | list[int]  # the bytes of a token that is no text by itself


class TokenizeResponse(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int | TokenPiece]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct, kw_only=True):
    """vLLM's; `content` is the same as llama.cpp names it, for requests that name no model, as its clients do."""

    prompt: str
    content: str | UnsetType = UNSET


class DeletedModel(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class VersionInfo(Struct, kw_only=True):
    version: str


class Status(Struct, kw_only=True):
    status: str
