"""Replay of a Mooncake trace: arrivals, lengths and shared prefixes of real traffic (FAST'25, arXiv 2407.00079).

A line holds `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one id per block of 512 prompt tokens;
equal ids stand for equal blocks after equal blocks. Here block i of a prompt becomes 512 tokens that all are its id,
so that the production prefix cache finds what the traced one could have found.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pelton.bench.record import RequestRecord
from pelton.core.errors import ConfigError
from pelton.core.request import DEFAULT_TENANT, Submission
from pelton.core.sampling_params import SamplingParams
from pelton.simulate.server import SimulatedServer

TRACE_BLOCK_TOKENS = 512


class TraceLine(msgspec.Struct, frozen=True):
    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`session` counts conversations: a request whose prompt goes on from an earlier one's belongs to its session."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]
    session: int

    def prompt_token_ids(self) -> list[int]:
        token_ids: list[int] = []
        for hash_id in self.hash_ids:
            token_ids += [hash_id] * TRACE_BLOCK_TOKENS
        return token_ids[: self.num_prompt_tokens]


def read_trace(path: Path, *, duration_s: float | None = None) -> list[TraceRequest]:
    """The requests of the first `duration_s`, by arrival. Raises `ConfigError`."""
    try:
        lines = [msgspec.json.decode(line, type=TraceLine) for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: is not a Mooncake trace: {error}") from error
    for line in lines:
        if line.input_length < 1 or len(line.hash_ids) * TRACE_BLOCK_TOKENS < line.input_length:
            raise ConfigError(f"{path}: hash_ids of the request at {line.timestamp} ms do not cover its input_length")
    lines.sort(key=lambda line: line.timestamp)
    kept = [line for line in lines if duration_s is None or line.timestamp <= duration_s * 1000]
    return list(_with_sessions(kept))


def _with_sessions(lines: Iterable[TraceLine]) -> Iterator[TraceRequest]:
    ends: dict[int, int] = {}  # last full block of a prompt -> session; the first block, a preamble, ends nobody's
    num_sessions = 0
    for line in lines:
        full = line.hash_ids[1 : line.input_length // TRACE_BLOCK_TOKENS]
        session = next((ends[hash_id] for hash_id in reversed(full) if hash_id in ends), None)
        if session is None:
            session, num_sessions = num_sessions, num_sessions + 1
        if full:
            ends[full[-1]] = session
        yield TraceRequest(
            line.timestamp / 1000, line.input_length, max(1, line.output_length), tuple(line.hash_ids), session
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlan:
    """`speed` 2 lets requests arrive twice as fast. Sessions are dealt to `num_tenants` tenants by `seed`."""

    speed: float = 1.0
    num_tenants: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.speed > 0 or self.num_tenants < 1:
            raise ConfigError("the speed must be above 0, and there must be at least one tenant")


async def replay(
    server: SimulatedServer, requests: list[TraceRequest], plan: ReplayPlan
) -> list[tuple[str, RequestRecord]]:
    """Tenant and record of every request, in order of arrival."""
    loop = asyncio.get_running_loop()
    rng = random.Random(plan.seed)
    tenants: dict[int, str] = {}
    pending: list[tuple[str, asyncio.Future[RequestRecord]]] = []
    for number, request in enumerate(requests):
        delay_s = request.arrival_s / plan.speed - loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        tenant = tenants.get(request.session)
        if tenant is None:
            tenant = DEFAULT_TENANT if plan.num_tenants == 1 else f"tenant-{rng.randrange(plan.num_tenants)}"
            tenants[request.session] = tenant
        submission = Submission(
            request_id=f"t{number}",
            prompt_token_ids=request.prompt_token_ids(),
            sampling=SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True),
            tenant_id=tenant,
            session_id=f"s{request.session}",
        )
        pending.append((tenant, server.submit(submission, keep_times=False)))
    return [(tenant, await record) for tenant, record in pending]
