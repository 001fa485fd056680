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
from pelton.serving.context import CUT_SLACK_TOKENS, ServingContext, new_answer_id, now_unix_s
from pelton.serving.openai.embeddings import as_floats
from pelton.serving.openai.parameters import check_belongs
from pelton.serving.openai.pooling_requests import (
    DocumentText,
    RankedDocument,
    RankedText,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
    ScoringRequest,
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
QUERY_NAMES = ("text_1", "queries", "data_1")
DOCUMENT_NAMES = ("text_2", "documents", "items", "data_2")
_CHARS_PER_TOKEN = 8  # a first guess
_CONTROL_MARKS = ("<|im_start|>", "<|im_end|>")


async def create_score(context: ServingContext, http_request: Request) -> Response:
    context.check_ready()
    request = await read_json_body(http_request, ScoreRequest, context.config.max_body_bytes)
    first, second = _side(request, QUERY_NAMES), _side(request, DOCUMENT_NAMES)
    answer_id = new_answer_id("score")
    scorer = _Scorer(context, request, http_request, answer_id)
    await scorer.prepare(_pairs(request, first, second), (first, second))

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
    if (request.documents is None) == (request.texts is None):
        raise InvalidRequestError(
            "send either documents or texts", param="documents", code="missing_required_parameter"
        )
    if request.texts is None:
        check_belongs(request, ("return_text",), "texts")
    documents = [part if isinstance(part, str) else part.text for part in request.documents or request.texts or ()]
    name = "documents" if request.texts is None else "texts"
    answer_id = new_answer_id("rerank")
    scorer = _Scorer(context, request, http_request, answer_id)
    await scorer.prepare([(request.query, document) for document in documents], ("query", name))

    async def compute() -> Ranking | list[RankedText]:
        scores, pooled = await scorer.run()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or None]
        if request.texts is not None:
            return [
                RankedText(index=index, score=scores[index], text=documents[index] if request.return_text else None)
                for index in order
            ]
        return Ranking(
            id=answer_id,
            model=request.model or context.model.names[0],
            results=[
                RankedDocument(
                    index=index,
                    relevance_score=scores[index],
                    document=DocumentText(text=documents[index]) if request.return_documents else None,
                )
                for index in order
            ],
            usage=pooled.usage,
        )

    return ComputedAnswer(compute)


def _side(request: ScoreRequest, names: tuple[str, ...]) -> str:
    """The one of `names` that was sent."""
    sent = [name for name in names if getattr(request, name) is not None]
    if not sent:
        raise InvalidRequestError(f"{names[0]} is required", param=names[0], code="missing_required_parameter")
    if len(sent) > 1:
        raise InvalidRequestError(f"{' and '.join(sent)} name the same texts: send one", param=sent[1])
    return sent[0]


def _pairs(request: ScoreRequest, first_name: str, second_name: str) -> list[tuple[str, str]]:
    first, second = (
        [texts] if isinstance(texts, str) else texts
        for texts in (getattr(request, first_name), getattr(request, second_name))
    )
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidRequestError(
            f"{first_name} has {len(first)} texts and {second_name} {len(second)}; "
            f"send one in {first_name}, or as many in both",
            param=first_name,
        )
    return list(zip(first, second, strict=True))


class _Scorer:
    def __init__(
        self,
        context: ServingContext,
        request: ScoringRequest,
        http_request: Request,
        answer_id: str,
    ) -> None:
        check_supported(request)
        context.check_model(request.model)
        self._labels = context.config.score_tokens
        if self._labels and request.pooling is not None:
            raise InvalidRequestError(
                f"this server scores by the answers {' and '.join(self._labels)}; leave pooling out", param="pooling"
            )
        if request.instruction is not None and not self._labels:
            raise InvalidRequestError(
                "instruction is for rerankers; this server scores by the cosine of embeddings: put it into the texts",
                param="instruction",
                code="unsupported_parameter",
            )
        self._context = context
        self._request = request
        self._instruction = request.instruction or _INSTRUCTION
        self._pooling = Pooling(context, request, http_request, answer_id)
        self._prompts: list[list[int]] = []
        self._places: list[tuple[int, int]] = []  # per pair: the prompts of its embeddings

    async def prepare(self, pairs: Sequence[tuple[str, str]], params: tuple[str, str]) -> None:
        """Token ids of what will be asked. Raises for texts that are empty or too long."""
        for texts, param in zip(zip(*pairs, strict=True), params, strict=True):
            if not all(texts):
                raise InvalidRequestError(f"{param} holds an empty text", param=param)
        limits = (self._request.max_tokens_per_query, self._request.max_tokens_per_doc)
        if any(limits):
            pairs = await self._shortened(pairs, limits)
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

    async def _shortened(self, pairs: Sequence[tuple[str, str]], limits: tuple[int, int]) -> list[tuple[str, str]]:
        """The first tokens of each text, as text, for they go into a question. Others get their turn in between."""
        context = self._context
        sides: list[dict[str, str]] = []
        for side, limit in enumerate(limits):
            most = min(limit, context.max_model_len)
            texts = dict.fromkeys(pair[side] for pair in pairs)
            sides.append({text: await context.prepare(_first_tokens, context.tokenizer, text, most) for text in texts})
        return [(sides[0][first], sides[1][second]) for first, second in pairs]

    def _question(self, query: str, document: str) -> str:
        for text in (query, document, self._instruction):
            if any(mark in text for mark in _CONTROL_MARKS):
                raise InvalidRequestError(f"a text to be scored must not hold {' or '.join(_CONTROL_MARKS)}")
        return _QUESTION.format(system=_SYSTEM, instruction=self._instruction, query=query, document=document)

    def _label_ids(self) -> tuple[int, ...]:
        return tuple(self._context.tokenizer.encode(label, add_special_tokens=False)[0] for label in self._labels)


def _first_tokens(tokenizer: Tokenizer, text: str, most: int) -> str:
    """Of a text, which may be far longer; 0: all."""
    num_chars = 0
    token_ids: list[int] = []
    while most and num_chars < len(text) and len(token_ids) <= most + CUT_SLACK_TOKENS:
        num_chars = max(2 * num_chars, most * _CHARS_PER_TOKEN)
        token_ids = tokenizer.encode(text[:num_chars], add_special_tokens=False)
    if len(token_ids) <= most:
        return text
    # What a cut within a character leaves of it is no text.
    return tokenizer.decode(token_ids[:most], skip_special_tokens=False).rstrip("\ufffd")


def check_score_tokens(config: ServerConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a word that is not one token."""
    for label in config.score_tokens:
        num_tokens = len(tokenizer.encode(label, add_special_tokens=False))
        if num_tokens != 1:
            raise ConfigError(f"score_tokens names {label!r}, which is {num_tokens} tokens; it must be one")


def _preference(logit: float, other: float) -> float:
    """softmax of the two, the first one's part."""
    return 1.0 / (1.0 + math.exp(min(700.0, other - logit)))
