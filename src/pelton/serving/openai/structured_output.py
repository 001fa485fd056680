"""What OpenAI and vLLM call structured output, as a `Grammar`: `response_format`, `structured_outputs`, `guided_*`."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from pelton.core.errors import InvalidRequestError
from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.sampling_params import SamplingParams
from pelton.serving.context import ServingContext
from pelton.serving.openai.requests import NULL, GenerationRequest, ResponseFormat, StructuredOutputs, out_of_place


async def constrained(
    context: ServingContext, request: GenerationRequest, sampling: SamplingParams, starts_after: str = ""
) -> SamplingParams:
    """`sampling` with the grammar that `request` asks for, if any, once that is known to compile.

    `starts_after`: see `Grammar`. Raises `GrammarError` and other typed errors.
    """
    found = requested_grammars(request)
    if not found:
        return sampling
    if len(found) > 1:
        names = " and ".join(found)
        raise InvalidRequestError(f"{names} exclude each other: an answer has one form", param=list(found)[-1])
    ((param, grammar),) = found.items()
    grammar = await context.check_grammar(replace(grammar, starts_after=starts_after), param)
    return replace(sampling, grammar=grammar)


def requested_grammars(request: GenerationRequest) -> dict[str, Grammar]:
    """By the parameter that asks for it. Raises `InvalidRequestError`."""
    found = _of_response_format(request.response_format)
    found |= _of_structured_outputs(request.structured_outputs)
    guided = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
    )
    found |= _of_constraints(guided, "guided_")
    found |= _of_constraints(StructuredOutputs(json=request.json_schema, grammar=request.grammar), "", "json_schema")
    return found


def _of_response_format(response_format: ResponseFormat | None) -> dict[str, Grammar]:
    if response_format is None:
        return {}
    if response_format.type != "json_schema" and response_format.json_schema is not None:
        raise out_of_place("response_format", response_format.type, "json_schema", "json_schema")
    if response_format.type != "json_object" and response_format.schema != NULL:
        raise InvalidRequestError(
            f"response_format.schema belongs to type 'json_object'; this is of type {response_format.type!r}, "
            "whose schema is json_schema.schema",
            param="response_format.schema",
        )
    if response_format.type == "text":
        return {}
    if response_format.type == "json_object":
        if response_format.schema != NULL:
            return {"response_format": _json_schema(response_format.schema, "response_format.schema")}
        return {"response_format": Grammar(kind=GrammarKind.JSON_OBJECT)}
    if response_format.json_schema is None:
        raise InvalidRequestError(
            "response_format of type 'json_schema' needs json_schema", param="response_format.json_schema"
        )
    schema = response_format.json_schema.schema
    return {"response_format": _json_schema(schema, "response_format.json_schema.schema")}


def _of_structured_outputs(wanted: StructuredOutputs | None) -> dict[str, Grammar]:
    if wanted is None:
        return {}
    found = _of_constraints(wanted, "structured_outputs.")
    if wanted.json_object:
        found["structured_outputs.json_object"] = Grammar(kind=GrammarKind.JSON_OBJECT)
    if not found:
        raise InvalidRequestError(
            "structured_outputs needs one of json, regex, choice, grammar and json_object", param="structured_outputs"
        )
    return found


def _of_constraints(wanted: StructuredOutputs, prefix: str, json_name: str = "json") -> dict[str, Grammar]:
    found: dict[str, Grammar] = {}
    if wanted.json != NULL:
        found[prefix + json_name] = _json_schema(_unquoted(wanted.json), prefix + json_name)
    if wanted.regex is not None:
        found[prefix + "regex"] = Grammar(kind=GrammarKind.REGEX, source=wanted.regex)
    if wanted.choice is not None:
        source = msgspec.json.encode(wanted.choice).decode()
        found[prefix + "choice"] = Grammar(kind=GrammarKind.CHOICE, source=source)
    if wanted.grammar is not None:
        found[prefix + "grammar"] = Grammar(kind=GrammarKind.LARK, source=wanted.grammar)
    return found


def _unquoted(raw: msgspec.Raw) -> bytes:
    """vLLM takes a schema as its text too."""
    return msgspec.json.decode(raw, type=str).strip().encode() if bytes(raw).startswith(b'"') else bytes(raw)


def _json_schema(raw: msgspec.Raw | bytes, param: str) -> Grammar:
    source = bytes(raw).decode()
    if not source.startswith("{") and source not in ("true", "false"):
        raise InvalidRequestError(f"{param} must be a JSON schema, an object", param=param, code="invalid_type")
    return Grammar(kind=GrammarKind.JSON_SCHEMA, source=source)
