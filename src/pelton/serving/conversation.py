"""A conversation to a turn: what every endpoint that chats hands to the engine, and how the answer is read.

Knows no endpoint: chat completions, responses and Anthropic's messages each make a `Conversation` of their own
request, and their own chunks and objects of the events that `PreparedTurn.plan` gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pelton.core.errors import InvalidRequestError
from pelton.core.grammar import Grammar, GrammarKind
from pelton.core.sampling_params import SamplingParams
from pelton.core.thinking import ThinkingBudget
from pelton.serving.context import ServingContext
from pelton.serving.dialect import Dialect
from pelton.serving.parsing.answer import AnswerPlan
from pelton.serving.reasoning.options import ReasoningOptions
from pelton.serving.tools.choice import NO_TOOLS, ToolMode, ToolUse
from pelton.serving.tools.format import ToolDefinition
from pelton.serving.tools.generic_prompt import with_tools_in_text
from pelton.serving.tools.lark import (
    answer_text,
    calls_grammar,
    free_grammar,
    text_grammar,
    thought_rule,
    without_schema,
)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`messages` as templates take them, the arguments of tool calls as objects."""

    messages: list[Message]
    tool_use: ToolUse = NO_TOOLS
    reasoning: ReasoningOptions = field(default_factory=ReasoningOptions)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    variables: Mapping[str, Any] | None = None  # of the template, over those that the options above lead to
    param: str = "messages"  # what an error is about


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTurn:
    """`plan` is None where the answer is plain text. `grammar` is what the tools ask for."""

    token_ids: list[int]
    plan: AnswerPlan | None = None
    grammar: Grammar | None = None
    shown_token_ids: tuple[int, ...] = ()
    thinking: ThinkingBudget | None = None
    reports_reasoning: bool = False
    tool_use: ToolUse = NO_TOOLS
    reasoning_end: str = ""  # what ends reasoning that is still to come, where it is plain text
    # The grammar of an answer that is calls or what a Lark expression says, after reasoning where there is some.
    grammar_of: Callable[[str], Grammar] | None = None


async def constrain_turn(context: ServingContext, turn: PreparedTurn, sampling: SamplingParams) -> SamplingParams:
    """`sampling` with what the turn asks for beside it. Raises `InvalidRequestError` where a tool's schema does not
    compile, or where a format of the answer leaves no room for calls."""
    grammar = turn.grammar
    asked = sampling.grammar
    if asked is not None and turn.grammar_of is not None:
        text = answer_text(asked)
        if text is None and turn.tool_use.may_call:
            raise InvalidRequestError(
                "a regular expression or a grammar for the answer does not go together with tools, whose calls it "
                "would have to allow: use a JSON schema or a choice, leave out the tools, or set tool_choice to 'none'",
                param="tools",
            )
        if text is None:
            grammar = replace(asked, starts_after=turn.reasoning_end)
        elif turn.tool_use.mode is not ToolMode.REQUIRED:  # calls alone have no text to be of a format
            grammar = turn.grammar_of(text)
    if grammar is not None:
        grammar = await _checked(context, turn, grammar)
    return replace(sampling, grammar=grammar or asked, shown_token_ids=turn.shown_token_ids, thinking=turn.thinking)


async def _checked(context: ServingContext, turn: PreparedTurn, grammar: Grammar) -> Grammar:
    """Raises `InvalidRequestError` with the place in the tool whose schema cannot be enforced."""
    try:
        return await context.check_grammar(grammar, "tools")
    except InvalidRequestError:
        for index, tool in enumerate(turn.tool_use.tools):
            schema = Grammar(kind=GrammarKind.JSON_SCHEMA, source=json.dumps(tool.parameters))
            await context.check_grammar(schema, f"tools[{index}].function.parameters")
        raise


def prepare_turn(context: ServingContext, conversation: Conversation) -> PreparedTurn:
    """Render, tokenize, and say how to read what comes. Slow: runs in the pool."""
    text = render(context, conversation)
    # The template writes BOS where the model wants one.
    token_ids = context.encode(text, add_special_tokens=conversation.add_special_tokens, param=conversation.param)
    return plan_turn(context.dialect, conversation, text, token_ids)


def render(context: ServingContext, conversation: Conversation) -> str:
    if context.template is None:
        raise InvalidRequestError(
            "this model has no chat template; use /v1/completions, or start the server with --chat-template",
            param=conversation.param,
            code="no_chat_template",
        )
    dialect, use = context.dialect, conversation.tool_use
    messages: Sequence[Message] = conversation.messages
    tools: list[dict[str, Any]] | None = None
    if not dialect.knows_tools:
        messages = with_tools_in_text(messages, use)
    elif use.may_call:
        tools = [_template_tool(tool) for tool in use.tools]
    if dialect.takes_argument_text:
        messages = [_with_argument_text(message) for message in messages]
    variables = {**dialect.switches.variables(conversation.reasoning), **(conversation.variables or {})}
    return context.template.render(
        messages,
        tools=tools,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        variables=variables,
    )


def plan_turn(dialect: Dialect, conversation: Conversation, prompt: str, token_ids: list[int]) -> PreparedTurn:
    """How to read the answer to a rendered `prompt`, and what to hold it to."""
    use, options, reasoning = conversation.tool_use, conversation.reasoning, dialect.reasoning_format
    if reasoning is None and (options.effort not in (None, "none") or options.budget is not None):
        raise InvalidRequestError(
            "this model does not reason, so there is no effort or budget of reasoning to set",
            param="reasoning_effort" if options.effort is not None else "thinking_budget",
            code="unsupported_parameter",
        )
    if not use.may_call and reasoning is None:
        return PreparedTurn(token_ids=token_ids)
    markers: tuple[str, ...] = ()
    plan = AnswerPlan(make_call_id=dialect.tool_format.make_call_id, hides_reasoning=not options.is_shown)
    if use.may_call:
        markers += dialect.tool_format.markers
        reads = dialect.tool_format.reader(
            frozenset(tool.name for tool in use.tools), starts_only=any(tool.strict for tool in use.tools)
        )
        plan = replace(plan, answer=reads, max_calls=None if use.is_parallel else 1)
    thinking, thought = None, ""
    if reasoning is not None:
        markers += reasoning.markers
        is_open, is_over = reasoning.is_open(prompt), reasoning.is_over(prompt)
        reads_reasoning = reasoning.reader(is_open=is_open)
        if reasoning.tells_tool_calls:
            plan = replace(plan, answer=reads_reasoning)
        elif not is_over:
            plan = replace(plan, reasoning=reads_reasoning, reasoning_end_id=dialect.single_token_id(reasoning.closing))
            thought = thought_rule(reasoning.opening, reasoning.closing, dialect.spell, is_open=is_open)
        if not is_over:
            thinking = _thinking_budget(dialect, options, is_open=is_open)
    return PreparedTurn(
        token_ids=token_ids,
        plan=plan,
        grammar=_tools_grammar(dialect, use, thought),
        shown_token_ids=dialect.special_token_ids(tuple(dict.fromkeys(markers))),
        thinking=thinking,
        reports_reasoning=reasoning is not None,
        tool_use=use,
        reasoning_end=reasoning.closing if thought and reasoning is not None else "",
        grammar_of=_answer_grammar(dialect, use, thought),
    )


def _tools_grammar(dialect: Dialect, use: ToolUse, thought: str) -> Grammar | None:
    """What holds calls to their schemas; None where the model is free."""
    if not use.may_call:
        return None
    syntax = dialect.tool_format.syntax(dialect.spell)
    if use.mode is ToolMode.REQUIRED:
        syntax = syntax.required or syntax
        source = calls_grammar(syntax, use.tools, dialect.spell, is_parallel=use.is_parallel, thought=thought)
    elif any(tool.strict for tool in use.tools):
        tools = [tool if tool.strict else without_schema(tool) for tool in use.tools]
        source = free_grammar(syntax, tools, dialect.spell, is_parallel=use.is_parallel, thought=thought)
    else:
        return None
    return Grammar(kind=GrammarKind.LARK, source=source)


def _answer_grammar(dialect: Dialect, use: ToolUse, thought: str) -> Callable[[str], Grammar] | None:
    """For an answer whose text has a format of its own; None where nothing but that text can come."""
    if not use.may_call and not thought:
        return None

    def grammar_of(text: str) -> Grammar:
        if not use.may_call:
            return Grammar(kind=GrammarKind.LARK, source=text_grammar(text, thought))
        syntax = replace(dialect.tool_format.syntax(dialect.spell), free=text)
        tools = [tool if tool.strict else without_schema(tool) for tool in use.tools]
        source = free_grammar(syntax, tools, dialect.spell, is_parallel=use.is_parallel, thought=thought)
        return Grammar(kind=GrammarKind.LARK, source=source)

    return grammar_of


def _thinking_budget(dialect: Dialect, options: ReasoningOptions, *, is_open: bool) -> ThinkingBudget | None:
    reasoning = dialect.reasoning_format
    budget = dialect.switches.budget(options)
    if reasoning is None or budget is None:
        return None
    return ThinkingBudget(
        max_tokens=budget,
        end_token_ids=dialect.encode(reasoning.closing),
        forced_token_ids=dialect.encode(reasoning.closing),
        start_token_ids=() if is_open else dialect.encode(reasoning.opening),
    )


def _template_tool(tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": tool.parameters}}


def _with_argument_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
    return {
        **message,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": text}}
            for call, text in zip(calls, texts, strict=True)
        ],
    }
