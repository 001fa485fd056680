"""POST /v1/score and /v1/rerank: how well texts go with a text.

A model that was taught to answer with one of two words (`--score-tokens yes,no`) is asked, and scores by the
probability of the first word against the second. Any other model scores by the cosine of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from pelton.core.errors import ConfigError, InvalidRequestError
from pelton.core.pooling import PoolingParams
from pelton.serving.config import ServerConfig
from pelton.serving.context import ServingContext, new_answer_id, now_unix_s
from pelton.serving.openai.embeddings import as_floats
from pelton.serving.openai.pooling_requests import (
    DocumentText,
    PoolingRequest,
    RankedDocument,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
)
from pelton.serving.openai.requests import check_supported
from pelton.serving.pooling import ComputedAnswer, Pooled, Pooling
from pelton.serving.request_body import read_json_body
from pelton.weights.tokenizer import Tokenizer

# How Qwen3-Reranker was taught to be asked (its model card).
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QUESTION = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n"
    "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_CONTROL_MARKS = ("<|im_start|>", "<|im_end|>")


async def create_score(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, ScoreRequest, context.config.max_body_bytes)
    pairs = _pairs(request)
    answer_id = new_answer_id("score")
    scorer = _Scorer(context, request, http_request, answer_id, request.instruction)
    await scorer.prepare(pairs, ("text_1", "text_2"))

    async def compute() -> ScoreList:
        scores, pooled = await scorer.run()
        return ScoreList(
            id=answer_id,
            created=now_unix_s(),
            model=request.model or context.model.names[0],
            data=[Score(index=index, score=score) for index, score in enumerate(scores)],
            usage=pooled.usage,
        )

    return ComputedAnswer(compute)


async def create_ranking(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, RerankRequest, context.config.max_body_bytes)
    documents = [part if isinstance(part, str) else part.text for part in request.documents]
    answer_id = new_answer_id("rerank")
    scorer = _Scorer(context, request, http_request, answer_id, request.instruction)
    await scorer.prepare([(request.query, document) for document in documents], ("query", "documents"))

    async def compute() -> Ranking:
        scores, pooled = await scorer.run()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return Ranking(
            id=answer_id,
            model=request.model or context.model.names[0],
            results=[
                RankedDocument(
                    index=index,
                    relevance_score=scores[index],
                    document=DocumentText(text=documents[index]) if request.return_documents else None,
                )
                for index in order[: request.top_n or len(order)]
            ],
            usage=pooled.usage,
        )

    return ComputedAnswer(compute)


def _pairs(request: ScoreRequest) -> list[tuple[str, str]]:
    first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidRequestError(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; send one in text_1, or as many in both",
            param="text_1",
        )
    return list(zip(first, second, strict=True))


class _Scorer:
    def __init__(
        self,
        context: ServingContext,
        request: PoolingRequest,
        http_request: Request,
        answer_id: str,
        instruction: str | None,
    ) -> None:
        check_supported(request)
        context.check_model(request.model)
        self._labels = context.config.score_tokens
        if self._labels and request.pooling is not None:
            raise InvalidRequestError(
                f"this server scores by the answers {' and '.join(self._labels)}; leave pooling out", param="pooling"
            )
        if instruction is not None and not self._labels:
            raise InvalidRequestError(
                "instruction is for rerankers; this server scores by the cosine of embeddings: put it into the texts",
                param="instruction",
                code="unsupported_parameter",
            )
        self._context = context
        self._request = request
        self._instruction = instruction or _INSTRUCTION
        self._pooling = Pooling(context, request, http_request, answer_id)
        self._prompts: list[list[int]] = []
        self._places: list[tuple[int, int]] = []  # per pair: the prompts of its embeddings

    async def prepare(self, pairs: Sequence[tuple[str, str]], params: tuple[str, str]) -> None:
        """Token ids of what will be asked. Raises for texts that are empty or too long."""
        for texts, param in zip(zip(*pairs, strict=True), params, strict=True):
            if not all(texts):
                raise InvalidRequestError(f"{param} holds an empty text", param=param)
        if self._labels:
            questions = [self._question(query, document) for query, document in pairs]
            self._prompts = await self._pooling.tokenize(questions, params[1])
            return
        # A text that is in several pairs is read once.
        texts_1 = dict.fromkeys(first for first, _ in pairs)
        texts_2 = dict.fromkeys(second for _, second in pairs if second not in texts_1)
        places = {text: place for place, text in enumerate((*texts_1, *texts_2))}
        self._prompts = await self._pooling.tokenize(list(texts_1), params[0])
        self._prompts += await self._pooling.tokenize(list(texts_2), params[1])
        self._places = [(places[first], places[second]) for first, second in pairs]

    async def run(self) -> tuple[list[float], Pooled]:
        if self._labels:
            params = PoolingParams(method="labels", normalize=False, label_token_ids=self._label_ids())
            pooled = await self._pooling.run(self._prompts, params)
            return [_preference(*as_floats(values)) for values in pooled.values], pooled
        method = self._request.pooling or self._context.model.pooling
        pooled = await self._pooling.run(self._prompts, PoolingParams(method=method))
        vectors = [as_floats(values) for values in pooled.values]
        scores = [math.fsum(map(float.__mul__, vectors[first], vectors[second])) for first, second in self._places]
        return scores, pooled

    def _question(self, query: str, document: str) -> str:
        for text in (query, document, self._instruction):
            if any(mark in text for mark in _CONTROL_MARKS):
                raise InvalidRequestError(f"a text to be scored must not hold {' or '.join(_CONTROL_MARKS)}")
        return _QUESTION.format(system=_SYSTEM, instruction=self._instruction, query=query, document=document)

    def _label_ids(self) -> tuple[int, ...]:
        return tuple(self._context.tokenizer.encode(label, add_special_tokens=False)[0] for label in self._labels)


def check_score_tokens(config: ServerConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a word that is not one token."""
    for label in config.score_tokens:
        num_tokens = len(tokenizer.encode(label, add_special_tokens=False))
        if num_tokens != 1:
            raise ConfigError(f"score_tokens names {label!r}, which is {num_tokens} tokens; it must be one")


def _preference(logit: float, other: float) -> float:
    """softmax of the two, the first one's part."""
    return 1.0 / (1.0 + math.exp(min(700.0, other - logit)))
