"""`pelton chat`: a conversation with a running server, in the terminal or from a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Annotated, Any

from cyclopts import Parameter

from pelton.cli.http_client import HttpClient, ServerError

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
# A model must not move the cursor or retitle the window.
_NOT_PRINTED = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_HELP = "/clear forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def chat(
    *,
    base_url: Annotated[
        str | None, Parameter(help=f"the server; default: PELTON_BASE_URL or {DEFAULT_BASE_URL}")
    ] = None,
    model: Annotated[str | None, Parameter(help="model to ask; default: the first that the server lists")] = None,
    api_key: Annotated[str | None, Parameter(help="bearer token; default: PELTON_API_KEY")] = None,
    system: Annotated[str | None, Parameter(help="instructions that come before the conversation")] = None,
    max_tokens: Annotated[int | None, Parameter(help="longest answer; default: what the context holds")] = None,
    temperature: Annotated[float | None, Parameter(help="0: always the likeliest token; default: the model's")] = None,
    seed: Annotated[int | None, Parameter(help="the same seed gives the same answer")] = None,
) -> int:
    """Talk to a running server. With a piped input: one answer, then exit."""
    client = HttpClient(
        base_url or os.environ.get("PELTON_BASE_URL") or DEFAULT_BASE_URL,
        api_key or os.environ.get("PELTON_API_KEY"),
    )
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    conversation = Conversation(client, model or _first_model(client), system, options)
    if not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if question:
            conversation.ask(question)
            print()
        return 0
    return _run_terminal(conversation)


def _first_model(client: HttpClient) -> str:
    try:
        return str(client.get("/v1/models")["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{client.base_url} lists no model") from error


class Conversation:
    """The messages so far; every answer is printed as it comes."""

    def __init__(self, client: HttpClient, model: str, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self.num_tokens = 0  # of the last answer
        self._client = client
        self._options = {name: value for name, value in options.items() if value is not None}
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)

    def clear(self) -> None:
        self._messages = list(self._first)

    def ask(self, question: str) -> None:
        """Print the answer. What was printed before a Ctrl-C stays in the conversation; a question that
        fails does not."""
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {
            "model": self.model,
            "messages": messages,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        answer = ""
        self.num_tokens = 0
        events = self._client.stream("/v1/chat/completions", body)
        try:
            for event in events:
                self.num_tokens = (event.get("usage") or {}).get("completion_tokens", self.num_tokens)
                for choice in event.get("choices") or ():
                    text = (choice.get("delta") or {}).get("content") or ""
                    answer += text
                    print(text.translate(_NOT_PRINTED), end="", flush=True)
        except KeyboardInterrupt:
            events.close()
            if not sys.stdin.isatty():
                raise
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]


def _run_terminal(conversation: Conversation) -> int:
    # Gives input() a history and keys to edit with, where the platform has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    print(f"{conversation.model}. {_HELP}.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves.")
            continue
        if line == "/exit":
            return 0
        if line == "/clear":
            conversation.clear()
            print("Forgotten.")
        elif line.startswith("/"):
            print(_HELP[0].upper() + _HELP[1:] + ".")
        elif line:
            _ask_and_time(conversation, line)


def _ask_and_time(conversation: Conversation, question: str) -> None:
    start_s = time.perf_counter()
    try:
        conversation.ask(question)
    except ServerError as error:
        print(f"pelton: {error}", file=sys.stderr)
        return
    elapsed_s = time.perf_counter() - start_s
    print()
    if conversation.num_tokens:
        print(f"\x1b[2m[{conversation.num_tokens} tokens, {conversation.num_tokens / elapsed_s:.1f} tok/s]\x1b[0m")
