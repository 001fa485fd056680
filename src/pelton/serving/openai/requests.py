"""Bodies of the OpenAI-compatible endpoints: strict structs, the source of decoding and of the schema.

Every parameter that OpenAI or vLLM define is here. One that Pelton does not implement is marked
`neutral(...)`: it may hold the values that change nothing, and anything else is refused by name.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from pelton.core.errors import InvalidRequestError
from pelton.core.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS, MAX_N, MAX_SEED, MAX_STOP_STRINGS
from pelton.serving.openai.tools import ModeName, Tool, ToolChoice
from pelton.serving.reasoning.options import Effort
from pelton.serving.tools.choice import MAX_TOOLS

MAX_TIMEOUT_S = 24 * 3600.0
# A body may be large; lists that a loop in Python goes over, or that go to the engine, may not.
MAX_LISTED_TOKENS = 1 << 20
MAX_STOP_TOKENS = 1024
MAX_BIASED_TOKENS = 1 << 14
INT32_MAX = 2**31 - 1
MAX_BAD_WORDS = 256


def neutral(*values: Any) -> Meta:
    """Marks a parameter that is not implemented: only null and `values` are taken."""
    allowed = [None, *values]
    # The values are spelled out because `Annotated` takes equal metadata, such as of 1.0 and True, for one.
    listed = ", ".join(map(repr, allowed))
    return Meta(extra_json_schema={"enum": allowed}, description=f"Not supported; may only be one of {listed}.")


def listed(name: str) -> dict[str, Any]:
    """JSON schema of a list of raw values that are decoded one by one as the struct of that name."""
    return {"x-items": name}


TOKEN_ID_KEY = "^[0-9]{1,9}$"
Count = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TruncationSide = Annotated[
    Literal["left", "right"], Meta(description="Where truncate_prompt_tokens cuts; right keeps the first tokens.")
]
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
ShortText = Annotated[str, Meta(max_length=512)]
StopString = Annotated[str, Meta(min_length=1)]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
LogprobTokenIds = Annotated[
    list[TokenId],
    Meta(min_length=1, max_length=MAX_LOGPROB_TOKEN_IDS, description="Logprobs of these, not of the most likely."),
]
Seed = Annotated[int, Meta(extra_json_schema={"minimum": -(2**63), "maximum": MAX_SEED})]
LogitBias = Annotated[
    # The keys are checked in sampling.py, whose error names those that are wrong.
    dict[
        Annotated[str, Meta(extra_json_schema={"pattern": TOKEN_ID_KEY})], Annotated[float, Meta(ge=-100.0, le=100.0)]
    ],
    Meta(max_length=MAX_BIASED_TOKENS, description="Token id, as a string, to what is added to its logit."),
]

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], ShortText],
    Meta(max_length=16, description="For your records; changes nothing."),
]


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, neutral(False)] = None

    @property
    def has_continuous_usage(self) -> bool:
        """Of a stream that reports usage at all, as vLLM reads the two."""
        return bool(self.include_usage and self.continuous_usage_stats)


# Kept as the client wrote it: the order of properties is that of the answer.
JSONSchema = Annotated[
    msgspec.Raw, Meta(extra_json_schema={"type": ["object", "boolean"]}, description="A JSON schema.")
]


class JSONSchemaFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    schema: JSONSchema
    name: Annotated[str, Meta(max_length=64, description="For your records; changes nothing.")] | None = None
    description: Annotated[str, Meta(description="For your records; changes nothing.")] | None = None
    strict: Annotated[bool, Meta(description="The schema is enforced either way.")] | None = None


SchemaOrText = Annotated[msgspec.Raw, Meta(description="A JSON schema, or its text.")]
NULL = msgspec.Raw(b"null")


def _null() -> msgspec.Raw:
    return NULL


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None
    schema: Annotated[msgspec.Raw, Meta(description="Of json_object: a JSON schema, as llama.cpp has it.")] = (
        msgspec.field(default_factory=_null)
    )


Choices = Annotated[list[str], Meta(min_length=1, max_length=1 << 14)]


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's; exactly one of the first five."""

    json: SchemaOrText = msgspec.field(default_factory=_null)
    regex: str | None = None
    choice: Choices | None = None
    grammar: Annotated[str, Meta(description="Lark, in llguidance's dialect, or GBNF.")] | None = None
    json_object: bool | None = None
    disable_any_whitespace: Annotated[Any, neutral(False)] = None
    disable_additional_properties: Annotated[Any, neutral(False)] = None
    disable_fallback: Annotated[Any, neutral(True, False)] = None
    whitespace_pattern: Annotated[Any, neutral()] = None
    structural_tag: Annotated[Any, neutral()] = None


class GenerationRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions have in common."""

    model: Annotated[str, Meta(description="A served name; default: the served model.")] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX, description="0 or -1: off.")] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LISTED_TOKENS)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Count | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: Logprobs | None = None
    logprob_token_ids: LogprobTokenIds | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: Annotated[bool, Meta(description="Logprobs spell tokens token_id:NUMBER.")] | None = (
        None
    )
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, le=INT32_MAX, description="Keep so many of the last; -1: as many as fit.")] | None
    ) = None
    truncation_side: TruncationSide | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[
        int, Meta(ge=-(2**31), le=INT32_MAX, description="Lower runs first, among the requests of a tenant.")
    ] = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    prompt_cache_key: Annotated[ShortText, Meta(description="Names the session, as X-Session-Id does.")] | None = None
    previous_response_id: (
        Annotated[ShortText, Meta(description="Names the session by the id of an earlier answer; fetches nothing.")]
        | None
    ) = None
    timeout_s: Annotated[float, Meta(gt=0.0, le=MAX_TIMEOUT_S, description="Deadline of this request.")] | None = None
    user: Annotated[ShortText, Meta(description="For your records; changes nothing.")] | None = None
    safety_identifier: Annotated[ShortText, Meta(description="For your records; changes nothing.")] | None = None
    metadata: Metadata | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText = msgspec.field(default_factory=_null)
    guided_regex: Annotated[str, Meta(description="The whole answer matches it.")] | None = None
    guided_choice: Choices | None = None
    guided_grammar: Annotated[str, Meta(description="Lark, in llguidance's dialect, or GBNF.")] | None = None
    # As llama.cpp names them.
    json_schema: SchemaOrText = msgspec.field(default_factory=_null)
    grammar: Annotated[str, Meta(description="Another name of guided_grammar.")] | None = None
    n_predict: Annotated[Any, neutral()] = None
    cache_prompt: Annotated[Any, neutral(True)] = None
    id_slot: Annotated[Any, neutral(-1)] = None
    timings_per_token: Annotated[Any, neutral(False)] = None
    return_progress: Annotated[Any, neutral(False)] = None

    store: Annotated[Any, neutral(False)] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    prompt_cache_retention: Annotated[Any, neutral("in_memory", "in-memory")] = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    moderation: Annotated[Any, neutral()] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    length_penalty: Annotated[Any, neutral(1.0)] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    guided_decoding_backend: Annotated[Any, neutral("auto", "guidance")] = None
    guided_whitespace_pattern: Annotated[Any, neutral()] = None
    logits_processors: Annotated[Any, neutral([])] = None
    kv_transfer_params: Annotated[Any, neutral()] = None
    vllm_xargs: Annotated[Any, neutral()] = None
    request_id: Annotated[Any, neutral()] = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Annotated[Count, Meta(description="Default 16, as OpenAI has it; 0 needs echo.")] | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: (
        Annotated[int, Meta(ge=1, le=MAX_N, description="Make so many, answer with the n of best mean logprob.")] | None
    ) = None
    add_special_tokens: bool = True
    suffix: Annotated[Any, neutral("")] = None
    prompt_embeds: Annotated[Any, neutral()] = None


class FunctionCall(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: str
    parsed_arguments: Annotated[
        Any, Meta(description="What the official client made of arguments; changes nothing.")
    ] = None


class ToolCall(Struct, kw_only=True, forbid_unknown_fields=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: Annotated[int, Meta(description="Of deltas that were put together; changes nothing.")] | None = None


class CacheControl(Struct, kw_only=True, forbid_unknown_fields=True):
    """Prefixes are cached whatever it says; `ttl` is how long one is wanted, not how long one is kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class ContentPart(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str | None = None
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: Annotated[Any, neutral()] = None


# Decoded one by one (messages.py), so that an error names the part.
ContentParts = Annotated[list[msgspec.Raw], Meta(extra_json_schema=listed("ContentPart"))]


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ContentParts | None = None
    type: Annotated[Literal["text"], Meta(description="lm-evaluation-harness sends it; changes nothing.")] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Annotated[str, Meta(description="Another name of reasoning_content.")] | None = None
    parsed: Annotated[Any, Meta(description="What the official client made of content; changes nothing.")] = None
    refusal: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
TemplateVariables = Annotated[dict[str, Any], Meta(description="Variables of the chat template.")]
ThinkingTokens = Annotated[Count, Meta(description="Most tokens of reasoning, before the answer is made to begin.")]


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Messages
    store: Annotated[bool, Meta(description="Keep the answer: it can be listed and retrieved.")] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: ModeName | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: Annotated[bool, Meta(description="False: reasoning is not sent, but counted.")] | None = None
    thinking_token_budget: ThinkingTokens | None = None
    thinking_budget: ThinkingTokens | None = None
    max_thinking_tokens: ThinkingTokens | None = None

    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none")] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    audio: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None
    chat_template: Annotated[Any, neutral()] = None
    documents: Annotated[Any, neutral([])] = None
    mm_processor_kwargs: Annotated[Any, neutral()] = None
    media_io_kwargs: Annotated[Any, neutral()] = None


@cache
def _neutral_values(struct: type[Struct]) -> tuple[tuple[str, list[Any]], ...]:
    """(field, values) of every field of `struct` that is marked neutral."""
    found = []
    for name, hint in get_type_hints(struct, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            if hint.__origin__ is Any and isinstance(meta, Meta) and meta.extra_json_schema:
                found.append((name, meta.extra_json_schema["enum"]))
    return tuple(found)


# Refused with more than the general reason.
_REASONS = {
    "suffix": "fill-in-the-middle is not supported: the model continues a prompt, it does not join two ends",
    "chat_template": "the server renders its own template only (a template is code); start it with --chat-template",
    "store": "text completions are not stored; chat completions and responses are",
    "service_tier": "there are no service tiers; priority orders the requests of a tenant",
    "prompt_cache_retention": "cached prompts are kept while there is room, longer within a session",
    "prompt_cache_options": "prompts are cached without being asked for; prompt_cache_key names the session",
    "moderation": "answers are not moderated here; do that on your side",
    "use_beam_search": "beam search is not supported; n samples several answers, best_of picks among them",
    "length_penalty": "length_penalty belongs to beam search, which is not supported; best_of ranks by mean logprob",
    "spaces_between_special_tokens": "special tokens are written as they stand, without spaces that no token has",
    "logits_processors": "code from clients is not run; see logit_bias, bad_words, allowed_token_ids",
    "n_predict": "send max_tokens, its name here",
    "cache_prompt": "prompts are always cached; a cache_salt of your own keeps this one to itself",
    "id_slot": "there are no slots to choose from; X-Session-Id names the session whose KV is kept",
    "timings_per_token": "timings are at /metrics and /v1/requests/{request_id}/timeline",
    "return_progress": "the progress of a prompt is not reported",
    "parse_special": "special tokens in a text are always read as such",
    "kv_transfer_params": "KV is not transferred between engines by a parameter of a request",
    "vllm_xargs": "there are no extra arguments beside the documented parameters",
    "request_id": "the server makes the ids of answers; send your own as the header X-Request-Id",
    "prompt_embeds": "prompts are texts or token ids, not embeddings",
    "modalities": "the model writes text only",
    "audio": "the model neither hears nor speaks",
    "prediction": "predicted outputs are not used; repeated prompts are cached without being asked for",
    "verbosity": "the model has no such setting; ask for short or long answers in the messages",
    "web_search_options": "the server does not search the web; give the model a tool that does",
    "documents": "documents are not supported; put them into the messages",
    "mm_processor_kwargs": "the model reads text only",
    "media_io_kwargs": "the model reads text only",
    "thread": "conversations are not held here: send all messages; their prefix is found in the cache",
    "context_management": "nothing is taken out of a conversation; send less of it",
    "functions": "functions are deprecated and not supported; send tools",
    "function_call": "function_call is deprecated and not supported; send tool_choice",
}


def check_supported(request: Struct, path: str = "") -> None:
    """Raise for a parameter that is not implemented and would have changed the result.

    Looks into structs within `request`, but not into lists of them: messages tell their own place.
    """
    for name, values in _neutral_values(type(request)):
        value = getattr(request, name)
        if value is None or any(value is allowed or _equal(value, allowed) for allowed in values):
            continue
        reason = _REASONS.get(name, f"{name} is not supported")
        if len(values) > 1:
            allowed_text = " or ".join(msgspec.json.encode(allowed).decode() for allowed in values)
            reason += f"; leave it out, or send {allowed_text}"
        raise InvalidRequestError(reason, param=path + name, code="unsupported_parameter")
    for name in request.__struct_fields__:
        inner = getattr(request, name)
        if isinstance(inner, Struct):
            check_supported(inner, f"{path}{name}.")


def out_of_place(path: str, kind: str, name: str, owner: str) -> InvalidRequestError:
    """Of a field that would be ignored: `path`, of type `kind`, has no `name`; that of type `owner` has."""
    return InvalidRequestError(
        f"{path}.{name} belongs to type {owner!r}; {path} is of type {kind!r}",
        param=f"{path}.{name}",
        code="unknown_parameter",
    )


def _equal(value: Any, allowed: Any) -> bool:
    """JSON equality: 1 and 1.0 are one number, true is none."""
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)
