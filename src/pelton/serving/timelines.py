"""`Timelines`: what happened to the latest requests, from the engine's events. GET /v1/requests/{id}/timeline."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from pelton.core.events import EventKind, RequestEvent
from pelton.engine.wire import EngineUpdate

MAX_REQUESTS = 2048
MAX_EVENTS = 256  # of a request; what comes after them is counted only, but for the end


class TimelineEvent(Struct, kw_only=True):
    kind: str
    at_s: float  # after the request was queued
    index: int  # of the sequence, where n > 1; over all prompts of the request
    num_tokens: int  # what the kind counts
    detail: str


class RequestTimeline(Struct, kw_only=True):
    id: str
    request_id: str  # of the HTTP request
    created: float
    status: Literal["queued", "running", "finished"]
    events: list[TimelineEvent]
    num_dropped_events: int
    session_id: str | None
    program_id: str | None
    object: Literal["request.timeline"] = "request.timeline"


@dataclass(slots=True)
class _Timeline:
    tenant_id: str
    answer: RequestTimeline
    submission_ids: Sequence[str]
    num_open: int
    queued_s: float | None = None


class Timelines:
    """A tenant finds its own requests only. Used on the event loop."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, _Timeline] = OrderedDict()  # by answer id, oldest first
        self._by_submission: dict[str, tuple[_Timeline, int]] = {}
        self._by_request: OrderedDict[tuple[str, str], str] = OrderedDict()  # (tenant, HTTP request) -> answer

    def begin(self, tenant_id: str, answer: RequestTimeline, submission_ids: Sequence[str], n: int) -> None:
        """A request has been handed to the engine: one submission a prompt, `n` sequences each."""
        timeline = _Timeline(tenant_id, answer, submission_ids, n * len(submission_ids))
        self._by_id[answer.id] = timeline
        for index, submission_id in enumerate(submission_ids):
            self._by_submission[submission_id] = (timeline, index * n)
        self._by_request[tenant_id, answer.request_id] = answer.id
        self._by_request.move_to_end((tenant_id, answer.request_id))
        if len(self._by_request) > MAX_REQUESTS:
            self._by_request.popitem(last=False)
        if len(self._by_id) > MAX_REQUESTS:
            _, oldest = self._by_id.popitem(last=False)
            for submission_id in oldest.submission_ids:
                del self._by_submission[submission_id]

    def find(self, tenant_id: str, name: str) -> RequestTimeline | None:
        """By the answer's id, or by the X-Request-Id that the request came or was answered with."""
        timeline = self._by_id.get(name) or self._by_id.get(self._by_request.get((tenant_id, name), ""))
        return timeline.answer if timeline is not None and timeline.tenant_id == tenant_id else None

    def take_update(self, update: EngineUpdate) -> None:
        """Listener of `EngineClient`."""
        for event in update.events:
            submission_id, _, index = event.request_id.partition("#")
            known = self._by_submission.get(submission_id)
            if known is not None:
                timeline, first = known
                self._take(timeline, event, first + int(index or 0))

    def _take(self, timeline: _Timeline, event: RequestEvent, index: int) -> None:
        answer = timeline.answer
        if timeline.queued_s is None:
            timeline.queued_s = event.time_s
        if event.kind is EventKind.SCHEDULED and answer.status == "queued":
            answer.status = "running"
        if event.kind is EventKind.FINISHED:
            timeline.num_open -= 1
            answer.status = "finished" if timeline.num_open <= 0 else answer.status
        if len(answer.events) >= MAX_EVENTS and event.kind is not EventKind.FINISHED:
            answer.num_dropped_events += 1
            return
        # The tenant asks for it, and knows who it is.
        detail = "" if event.kind is EventKind.QUEUED else event.detail
        if event.kind is EventKind.PREEMPTED and not detail.endswith(("itself", f"(tenant {timeline.tenant_id})")):
            detail = "no free KV block for a request of another tenant"  # whose name and ids are its own
        answer.events.append(
            TimelineEvent(
                kind=event.kind.value,
                at_s=round(event.time_s - timeline.queued_s, 6),
                index=index,
                num_tokens=event.num_tokens,
                detail=detail,
            )
        )


def new_timeline(answer_id: str, request_id: str, session_id: str | None, program_id: str | None) -> RequestTimeline:
    return RequestTimeline(
        id=answer_id,
        request_id=request_id,
        created=time.time(),
        status="queued",
        events=[],
        num_dropped_events=0,
        session_id=session_id,
        program_id=program_id,
    )
