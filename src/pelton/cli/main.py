"""The `pelton` command. Commands are imported when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError

from pelton.cli.vllm_flags import missing_flag_hint
from pelton.core.errors import ConfigError, PeltonError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 wrongly called, 130 interrupted."""
    try:
        result = make_app()(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_usage_message(error), EXIT_USAGE)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except PeltonError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def make_app(console: Console | None = None) -> App:
    app = App(
        name="pelton",
        help="An LLM serving engine made for agents.",
        version=_version,
        console=console,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    for name, target, help in (
        ("serve", "pelton.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API does."),
        ("chat", "pelton.cli.chat:chat", "Talk to a running server."),
        ("generate", "pelton.cli.generate:generate", "Complete prompts without a server."),
        ("models", "pelton.cli.models:app", "List, pull, show and remove models."),
        ("keys", "pelton.cli.keys:app", "Make, list, rotate and revoke API keys."),
        ("usage", "pelton.cli.usage:usage", "Show tokens used, by tenant and key."),
        ("bench", "pelton.cli.bench:app", "Measure servers under load, and kernels."),
        ("simulate", "pelton.cli.simulate:app", "Run the scheduler and the KV cache on virtual time."),
        ("env", "pelton.cli.environment:env", "Show machine, versions and what Pelton would use."),
    ):
        app.command(target, name=name, help=help)
    return app


def _version() -> str:
    from importlib.metadata import version

    return version("pelton")


def _usage_message(error: CycloptsError) -> str:
    if isinstance(error, UnknownOptionError):
        flag = (error.token.keyword or error.token.value).split("=", 1)[0]
        hint = missing_flag_hint(flag)
        if hint is not None:
            return f"{flag}: {hint}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument: {error.unused_tokens[0]}"
    error.verbose = False
    return " ".join(str(error).split())


def _fail(message: str, code: int) -> int:
    print(f"pelton: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
