"""A conversation to a turn: what every endpoint that chats hands to the engine, and how the answer is read.

Knows no endpoint: chat completions, responses and Anthropic's messages each make a `Conversation` of their own
request, and their own chunks and objects of the events that `PreparedTurn.plan` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from pelton.serving.tools.lark import calls_grammar, optional_calls_grammar, triggered_grammar, without_schema

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
    # Where reasoning ends that an answer begins with for certain: a grammar of the answer starts after it.
    reasoning_end: str = ""

    def apply(self, sampling: SamplingParams) -> SamplingParams:
        """Raises `InvalidRequestError` where the tools' grammar meets one that the request brought."""
        if self.grammar is not None and sampling.grammar is not None:
            raise InvalidRequestError(
                "the choice of tools leaves no room for another format: send tool_choice 'auto' without strict "
                "tools, or leave response_format out",
                param="tool_choice",
            )
        grammar = self.grammar or sampling.grammar
        if grammar is not None and grammar is not self.grammar and self.reasoning_end and not grammar.starts_after:
            grammar = replace(grammar, starts_after=self.reasoning_end)
        return replace(sampling, grammar=grammar, shown_token_ids=self.shown_token_ids, thinking=self.thinking)


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
    thinking, reasoning_end, before = None, "", ""
    if reasoning is not None:
        markers += reasoning.markers
        is_open, is_over = reasoning.is_open(prompt), reasoning.is_over(prompt)
        reads_reasoning = reasoning.reader(is_open=is_open)
        if reasoning.tells_tool_calls:
            plan = replace(plan, answer=reads_reasoning)
        elif not is_over:
            plan = replace(plan, reasoning=reads_reasoning, reasoning_end_id=dialect.single_token_id(reasoning.closing))
            reasoning_end = reasoning.closing if is_open else ""
            before = _reasoning_before(dialect, is_open=is_open)
        if not is_over:
            thinking = _thinking_budget(dialect, options, is_open=is_open)
    return PreparedTurn(
        token_ids=token_ids,
        plan=plan,
        grammar=_tools_grammar(dialect, use, before, reasoning_end),
        shown_token_ids=dialect.special_token_ids(tuple(dict.fromkeys(markers))),
        thinking=thinking,
        reports_reasoning=reasoning is not None,
        reasoning_end=reasoning_end,
    )


def _tools_grammar(dialect: Dialect, use: ToolUse, before: str, reasoning_end: str) -> Grammar | None:
    """What holds calls to their schemas; None where the model is free."""
    if not use.may_call:
        return None
    syntax = dialect.tool_format.syntax(dialect.spell)
    if use.mode is ToolMode.REQUIRED:
        source = calls_grammar(syntax, use.tools, dialect.spell, is_parallel=use.is_parallel, before=before)
        return Grammar(kind=GrammarKind.LARK, source=source, starts_after=reasoning_end)
    tools = [tool if tool.strict else without_schema(tool) for tool in use.tools]
    is_strict = any(tool.strict for tool in use.tools)
    if syntax.trigger and (is_strict or not use.is_parallel):
        source = triggered_grammar(syntax, tools, is_parallel=use.is_parallel)
        return Grammar(kind=GrammarKind.LARK, source=source, starts_after=syntax.trigger)
    if is_strict:
        source = optional_calls_grammar(syntax, tools, is_parallel=use.is_parallel, before=before)
        return Grammar(kind=GrammarKind.LARK, source=source, starts_after=reasoning_end)
    return None


def _reasoning_before(dialect: Dialect, *, is_open: bool) -> str:
    """What of reasoning a grammar of the whole answer allows ahead of it: the model may or may not think."""
    reasoning = dialect.reasoning_format
    assert reasoning is not None
    space = r"/\n{0,2}/"
    if is_open:  # the grammar starts after its end
        return space
    closing = dialect.spell(reasoning.closing)
    return f"({dialect.spell(reasoning.opening)} /(?s:.*)/ {closing} {space})?"


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
