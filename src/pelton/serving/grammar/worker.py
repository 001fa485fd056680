"""The helper process that checks grammars (`helper_worker.py`)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pelton.core.grammar import Grammar
from pelton.serving.helper_worker import run_helper
from pelton.weights.tokenizer.grammar import GrammarCompiler, GrammarError, GrammarVocabulary


class CheckAnswer(msgspec.Struct, array_like=True):
    grammar: Grammar | None  # as the worker is to have it
    problem: str = ""


def make_answerer(setup: bytes) -> Callable[[bytes], bytes]:
    from pelton.serving.grammar.check import check_grammar

    compiler = GrammarCompiler(msgspec.msgpack.decode(setup, type=GrammarVocabulary))
    grammars = msgspec.msgpack.Decoder(Grammar)

    def answer(frame: bytes) -> bytes:
        try:
            found = CheckAnswer(check_grammar(compiler, grammars.decode(frame)))
        except GrammarError as error:
            found = CheckAnswer(None, str(error))
        except RecursionError:
            found = CheckAnswer(None, "the grammar is nested too deeply")
        return msgspec.msgpack.encode(found)

    return answer


if __name__ == "__main__":
    run_helper(make_answerer)
