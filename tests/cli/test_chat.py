import asyncio
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.bench.server import FakeServer, running
from tests.cli.run import clean_environment, pelton


async def test_piped_question_gets_one_answer() -> None:
    async with running(FakeServer()) as server:
        result = await pelton("chat", "--max-tokens", "7", stdin="tell me\n", PELTON_BASE_URL=server.base_url)
    assert (result.code, result.out, result.err) == (0, "1: tell me \n", "")
    (body,) = server.bodies
    assert body["model"] == "fake-model"
    assert body["messages"] == [{"role": "user", "content": "tell me"}]
    assert (body["stream"], body["max_tokens"], "temperature" in body) == (True, 7, False)


async def test_system_message_and_address_with_v1() -> None:
    async with running(FakeServer()) as server:
        result = await pelton("chat", "--system", "be brief", "--base-url", f"{server.base_url}/v1/", stdin="x")
    assert result.out == "2: x \n"
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [("in_band", "pelton: engine died\n"), ("cut", "pelton: the server hung up before the answer ended\n")],
)
async def test_an_answer_that_breaks_off(fault: str, message: str) -> None:
    async with running(FakeServer(fault=fault)) as server:
        result = await pelton("chat", "--base-url", server.base_url, stdin="a b c d e")
    assert (result.code, result.out.strip()) == (1, "1: a b")
    assert result.err.endswith(message)


async def test_control_characters_do_not_reach_the_terminal() -> None:
    async with running(FakeServer()) as server:
        result = await pelton("chat", "--base-url", server.base_url, stdin="a\x1b]0;title\x07b\x9b2J")
    assert result.out == "1: a]0;titleb2J \n"


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._seen = ""
        os.set_blocking(descriptor, False)

    async def wait_for(self, text: str) -> str:
        """What came up to and with `text`."""
        async with asyncio.timeout(20):
            while text not in self._seen:
                try:
                    self._seen += os.read(self._descriptor, 4096).decode()
                except OSError:
                    await asyncio.sleep(0.01)
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def exit_code(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@asynccontextmanager
async def chat_terminal(base_url: str) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "pelton.cli.main", "chat", "--base-url", base_url),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment() | {"TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


async def test_conversation_remembers_until_cleared() -> None:
    async with running(FakeServer()) as server, chat_terminal(server.base_url) as terminal:
        await terminal.wait_for("> ")
        terminal.type("one\n")
        await terminal.wait_for("1: one")
        await terminal.wait_for("tok/s]")
        terminal.type("two\n")
        await terminal.wait_for("3: two")
        terminal.type("/clear\n")
        await terminal.wait_for("Forgotten.")
        terminal.type("three\n")
        await terminal.wait_for("1: three")
        terminal.type("/what\n")
        await terminal.wait_for("/clear forgets the conversation")
        terminal.type("/exit\n")
        assert await terminal.exit_code() == 0


async def test_interrupt_stops_the_answer_and_hangs_up() -> None:
    async with running(FakeServer(delay_s=0.05)) as server, chat_terminal(server.base_url) as terminal:
        await terminal.wait_for("> ")
        terminal.type("word " * 200 + "\n")
        await terminal.wait_for("1: word word")
        terminal.interrupt()
        await terminal.wait_for("> ")
        await server.idle.wait()
        terminal.type("again\n")
        await terminal.wait_for("3: again")  # what was said before the interrupt is remembered
        await terminal.wait_for("> ")
        terminal.type("\x04")
        assert await terminal.exit_code() == 0


async def test_a_failed_question_is_forgotten_and_the_chat_goes_on() -> None:
    async with running(FakeServer(fault="in_band")) as server, chat_terminal(server.base_url) as terminal:
        await terminal.wait_for("> ")
        terminal.type("a b c d\n")
        await terminal.wait_for("pelton: engine died")
        server.fault = ""
        terminal.type("short\n")
        await terminal.wait_for("1: short")
