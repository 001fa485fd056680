"""Bodies and answers of the endpoints that read a model instead of letting it write."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pelton.serving.openai.requests import (
    INT32_MAX,
    MAX_TIMEOUT_S,
    Count,
    Messages,
    ShortText,
    TemplateVariables,
    TokenId,
    TruncationSide,
    neutral,
)

MAX_INPUTS = 2048
PoolingName = Literal["last", "mean", "cls"]
Texts = Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]


class PoolingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What embeddings, scores and rankings have in common."""

    model: Annotated[str, Meta(description="A served name; default: the served model.")] | None = None
    pooling: Annotated[PoolingName, Meta(description="Default: the model's own, or last.")] | None = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, le=INT32_MAX, description="Keep so many of the last; -1: as many as fit.")] | None
    ) = None
    truncation_side: TruncationSide | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=INT32_MAX)] = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    timeout_s: Annotated[float, Meta(gt=0.0, le=MAX_TIMEOUT_S)] | None = None
    user: Annotated[ShortText, Meta(description="For your records; changes nothing.")] | None = None
    mm_processor_kwargs: Annotated[Any, neutral()] = None
    request_id: Annotated[Any, neutral()] = None

    @property
    def prompt_cache_key(self) -> None:
        return None  # it belongs to no session

    @property
    def previous_response_id(self) -> None:
        return None


class EmbeddingRequest(PoolingRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings: of texts, or of a conversation as the chat template writes it."""

    input: str | list[str | TokenId | list[TokenId]] | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables | None = None
    dimensions: Annotated[int, Meta(ge=1, le=INT32_MAX, description="Keep so many values, then normalize.")] | None = (
        None
    )
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool = True
    chat_template: Annotated[Any, neutral()] = None
    padding: Annotated[Any, neutral(False)] = None


class ScoringRequest(PoolingRequest, kw_only=True, forbid_unknown_fields=True):
    """What scores and rankings have in common."""

    instruction: Annotated[str, Meta(description="For rerankers only.")] | None = None
    max_tokens_per_query: Annotated[Count, Meta(description="Keep so many tokens of each; 0: all.")] = 0
    max_tokens_per_doc: Annotated[Count, Meta(description="Keep so many tokens of each; 0: all.")] = 0


class ScoreRequest(ScoringRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/score: one text against many, or as many pairs, each side under one of its names."""

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: Annotated[str | Texts | None, Meta(description="Another name of text_1.")] = None
    documents: Annotated[str | Texts | None, Meta(description="Another name of text_2.")] = None
    items: Annotated[str | Texts | None, Meta(description="Another name of text_2.")] = None
    data_1: Annotated[str | Texts | None, Meta(description="Another name of text_1.")] = None
    data_2: Annotated[str | Texts | None, Meta(description="Another name of text_2.")] = None


class DocumentText(Struct, kw_only=True, forbid_unknown_fields=True):
    text: str


class RerankRequest(ScoringRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/rerank, as Jina, Cohere and vLLM have it; with `texts`, as Text Embeddings Inference and llama.cpp."""

    query: str
    documents: Annotated[list[str | DocumentText], Meta(min_length=1, max_length=MAX_INPUTS)] | None = None
    texts: Annotated[Texts, Meta(description="Documents; the answer is then a list of scores.")] | None = None
    top_n: Annotated[int, Meta(ge=0, le=INT32_MAX, description="0: all.")] | None = None
    return_documents: bool = True
    return_text: Annotated[bool, Meta(description="Of texts: answer with each.")] = False
    raw_scores: Annotated[Any, neutral(False)] = None
    max_chunks_per_doc: Annotated[Any, neutral()] = None
    rank_fields: Annotated[Any, neutral()] = None


class PoolingUsage(Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, kw_only=True):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(Struct, kw_only=True):
    id: str
    created: int
    data: list[Embedding]
    model: str
    usage: PoolingUsage
    object: Literal["list"] = "list"


class Score(Struct, kw_only=True):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(Struct, kw_only=True):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class RankedDocument(Struct, kw_only=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: DocumentText | None = None


class RankedText(Struct, kw_only=True, omit_defaults=True):
    index: int
    score: float
    text: str | None = None


class Ranking(Struct, kw_only=True):
    id: str
    model: str
    results: list[RankedDocument]
    usage: PoolingUsage
