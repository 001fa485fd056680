"""Sessions, timelines, bounds and metrics by tenant, over HTTP."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx2
import openai
import pytest

from pelton.core.events import EngineStats, EventKind, RequestEvent
from pelton.engine.wire import EngineUpdate
from pelton.serving.caller import answered_tools
from pelton.serving.openai.requests import ChatMessage, FunctionCall, ToolCall
from pelton.serving.timelines import MAX_EVENTS, MAX_REQUESTS, RequestTimeline, Timelines, new_timeline
from tests.serving.make import MODEL_NAME, RunningServer, running_server
from tests.serving.test_status import samples

SYSTEM: Any = {"role": "system", "content": "You are a careful agent with many tools."}


@pytest.fixture
def own() -> Iterator[RunningServer]:
    """A server of the test's own, on which keeping KV pays: prefill takes a second a token, or so it thinks."""
    with running_server() as server:
        engine = server.client._transport._loop.engine  # type: ignore[attr-defined]
        engine.tenancy.costs.prefill.observe(100, 0.0, 100.0)
        engine.tenancy.costs.prefill.observe_step = lambda *_: None
        yield server


def client_of(server: RunningServer, **headers: str) -> openai.OpenAI:
    names = {"tenant": "X-Tenant-Id", "session": "X-Session-Id", "program": "X-Program-Id"}
    return openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        default_headers={names[name]: value for name, value in headers.items()},
    )


def sessions_of(server: RunningServer, tenant: str = "default") -> list[dict[str, Any]]:
    answer = httpx2.get(f"{server.url}/v1/sessions", headers={"X-Tenant-Id": tenant}).json()
    assert answer["object"] == "list"
    return list(answer["data"])


def converse(client: openai.OpenAI, num_turns: int, first: str = "Hello there", **extra: Any) -> list[Any]:
    """Turns of a conversation; the answers."""
    messages: list[Any] = [SYSTEM, {"role": "user", "content": first}]
    answers = []
    for turn in range(num_turns):
        answer = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=20, **extra)
        answers.append(answer)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": f"And then, in turn {turn}?"})
    return answers


@pytest.mark.parametrize(
    ("headers", "extra", "session_id"),
    [
        ({}, {}, None),
        ({"session": "mine"}, {}, "mine"),
        ({}, {"prompt_cache_key": "a key: ünïcode / slash"}, "a key: ünïcode / slash"),
        ({"session": "header-wins"}, {"prompt_cache_key": "key"}, "header-wins"),
    ],
    ids=["inferred", "header", "prompt_cache_key", "both"],
)
def test_a_conversation_is_a_session(
    own: RunningServer, headers: dict[str, str], extra: dict[str, Any], session_id: str | None
) -> None:
    answers = converse(client_of(own, **headers), 3, **extra)
    (session,) = sessions_of(own)
    assert session["num_turns"] == 3
    assert session["num_running"] == 0
    assert session["is_inferred"] == (session_id is None)
    assert session["num_pinned_blocks"] > 0
    assert session["pin_expires_in_s"] > 0
    assert session["created"] <= session["last_used"] <= time.time()
    assert answers[2].usage.prompt_tokens_details.cached_tokens > answers[1].usage.prompt_tokens
    if session_id is not None:
        assert session["id"] == session["program_id"] == session_id
    deleted = httpx2.delete(f"{own.url}/v1/sessions/{quote(session['id'], safe='')}")
    assert deleted.json() == {"id": session["id"], "object": "session.deleted", "deleted": True}
    assert sessions_of(own) == []
    again = httpx2.delete(f"{own.url}/v1/sessions/{quote(session['id'], safe='')}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "session_not_found")
    metrics = samples(httpx2.get(f"{own.url}/metrics").text)
    assert metrics["vllm:kv_cache_usage_perc", ()] == 0.0


def test_an_earlier_answer_names_the_session(own: RunningServer) -> None:
    client = client_of(own)
    first = client.chat.completions.create(model=MODEL_NAME, messages=[SYSTEM], max_tokens=5)
    # Its context was rewritten, so that no prefix tells.
    body: Any = {"previous_response_id": first.id}
    client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "In short:"}], max_tokens=5, extra_body=body
    )
    (session,) = sessions_of(own)
    assert session["num_turns"] == 2
    client_of(own, tenant="other").chat.completions.create(
        model=MODEL_NAME, messages=[SYSTEM], max_tokens=5, extra_body=body
    )
    assert [item["num_turns"] for item in sessions_of(own, "other")] == [1]


def test_sub_agents_share_a_program(own: RunningServer) -> None:
    converse(client_of(own, session="main", program="run-1"), 2)
    converse(client_of(own, session="sub", program="run-1"), 1, first="Something else")
    assert {(item["id"], item["program_id"]) for item in sessions_of(own)} == {("main", "run-1"), ("sub", "run-1")}


def test_tenants_see_and_touch_only_their_own(own: RunningServer) -> None:
    """One id, two tenants: neither lists, deletes, times nor reuses what is the other's."""
    (secret,) = converse(client_of(own, tenant="alice", session="s"), 1)
    assert sessions_of(own, "bob") == sessions_of(own) == []
    for tenant in ("bob", "default", "Alice", "alice2"):
        headers = {"X-Tenant-Id": tenant}
        assert httpx2.delete(f"{own.url}/v1/sessions/s", headers=headers).status_code == 404
        assert httpx2.get(f"{own.url}/v1/requests/{secret.id}/timeline", headers=headers).status_code == 404
    (answer,) = converse(client_of(own, tenant="bob", session="s"), 1)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert [item["num_turns"] for item in sessions_of(own, "alice")] == [1]
    assert httpx2.delete(f"{own.url}/v1/sessions/s", headers={"X-Tenant-Id": "bob"}).status_code == 200
    assert len(sessions_of(own, "alice")) == 1


def test_the_timeline_of_a_request(own: RunningServer) -> None:
    client = client_of(own, session="s", program="p")
    # 600 prompt tokens are more than a step computes.
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "x" * 600}], max_tokens=3, n=2
    )
    answer = raw.parse()
    timeline = httpx2.get(f"{own.url}/v1/requests/{answer.id}/timeline").json()
    assert timeline["object"] == "request.timeline"
    assert (timeline["status"], timeline["session_id"], timeline["program_id"]) == ("finished", "s", "p")
    first = [event for event in timeline["events"] if event["index"] == 0]
    kinds = [event["kind"] for event in first]
    assert kinds == ["queued", "scheduled", "computed", "computed", "first_token", "pinned", "finished"]
    assert sum(event["num_tokens"] for event in first if event["kind"] == "computed") == answer.usage.prompt_tokens
    times = [event["at_s"] for event in timeline["events"]]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert [event["kind"] for event in timeline["events"] if event["index"] == 1][-1] == "finished"
    by_header = httpx2.get(f"{own.url}/v1/requests/{raw.headers['x-request-id']}/timeline").json()
    assert by_header == timeline
    assert httpx2.get(f"{own.url}/v1/requests/nothing/timeline").status_code == 404


@pytest.mark.parametrize("tenants", [("a", "a"), ("a", "b")])
def test_who_was_preempted_and_why_is_told(tenants: tuple[str, str]) -> None:
    with running_server(num_blocks=40, max_model_len=140, delay_s=0.002) as server:
        body = {"max_tokens": 100, "ignore_eos": True}

        def ask(index: int) -> tuple[str, dict[str, Any]]:
            """The answer's id, and its timeline."""
            headers = {"X-Tenant-Id": tenants[index]}
            with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as http:
                answer = http.post("/v1/completions", json=body | {"prompt": f"{index}" * 30}).json()
                return answer["id"], http.get(f"/v1/requests/{answer['id']}/timeline").json()

        with ThreadPoolExecutor(2) as pool:
            timelines = dict(pool.map(ask, range(2)))
        told = [
            (answer_id, event["detail"], event["num_tokens"])
            for answer_id, timeline in timelines.items()
            for event in timeline["events"]
            if event["kind"] == "preempted"
        ]
        metrics = httpx2.get(f"{server.url}/metrics").text
    assert told
    loser, reason, num_tokens = told[0]
    (winner,) = set(timelines) - {loser}
    other = f"{winner} (tenant a)" if tenants[1] == "a" else "a request of another tenant"
    assert reason in ("no free KV block for itself", f"no free KV block for {other}")
    assert num_tokens > 30
    (counted,) = re.findall(r"^vllm:num_preemptions_total{.*} ([0-9.]+)$", metrics, re.MULTILINE)
    assert float(counted) == len(told)


def test_a_timeline_can_be_watched_while_the_request_runs(slow_server: RunningServer) -> None:
    with httpx2.Client(base_url=slow_server.url, timeout=30) as http:
        headers = {"X-Request-Id": "watch-me", "X-Tenant-Id": "watcher"}
        body = {"prompt": ["a", "b"], "max_tokens": 30, "stream": True}
        with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            timeline = http.get("/v1/requests/watch-me/timeline", headers=headers).json()
            assert timeline["status"] == "running"
            assert {event["index"] for event in timeline["events"]} == {0, 1}
            sessions = http.get("/v1/sessions", headers=headers).json()["data"]
            assert [item["num_running"] for item in sessions] == [1, 1]
        deadline_s = time.monotonic() + 10
        while http.get("/v1/requests/watch-me/timeline", headers=headers).json()["status"] != "finished":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        timeline = http.get("/v1/requests/watch-me/timeline", headers=headers).json()
    del lines  # until here: closing it would end the request
    assert timeline["events"][-1]["detail"] == "request_cancelled"


def test_timelines_are_bounded() -> None:
    timelines = Timelines()
    for index in range(2 * MAX_REQUESTS):
        timelines.begin("t", new_timeline(f"a{index}", "same", None, None), [f"a{index}"], 1)
    assert len(timelines._by_id) == len(timelines._by_submission) == MAX_REQUESTS
    assert len(timelines._by_request) == 1
    found = timelines.find("t", "same")
    assert isinstance(found, RequestTimeline)
    assert found.id == f"a{2 * MAX_REQUESTS - 1}"
    events = [RequestEvent(found.id, EventKind.COMPUTED, float(n), 1) for n in range(MAX_EVENTS + 10)]
    events.append(RequestEvent(found.id, EventKind.FINISHED, 999.0, 1, "stop"))
    timelines.take_update(EngineUpdate((), tuple(events), EngineStats()))
    assert (len(found.events), found.num_dropped_events) == (MAX_EVENTS + 1, 10)
    assert (found.status, found.events[-1].kind) == ("finished", "finished")


@pytest.mark.parametrize(
    ("whom", "told"),
    [
        ("itself", "itself"),
        ("r (tenant t)", "r (tenant t)"),
        ("r (tenant u)", "a request of another tenant"),
        ("r (tenant ut)", "a request of another tenant"),
    ],
)
def test_a_timeline_names_no_other_tenant(whom: str, told: str) -> None:
    timelines = Timelines()
    timelines.begin("t", new_timeline("a", "r", None, None), ["a"], 1)
    event = RequestEvent("a", EventKind.PREEMPTED, 1.0, 9, f"no free KV block for {whom}")
    timelines.take_update(EngineUpdate((), (event,), EngineStats()))
    found = timelines.find("t", "a")
    assert found is not None
    assert [event.detail for event in found.events] == [f"no free KV block for {told}"]


def message(role: Any, **fields: Any) -> ChatMessage:
    return ChatMessage(role=role, **fields)


def call(name: str, call_id: str) -> ToolCall:
    return ToolCall(function=FunctionCall(name=name, arguments="{}"), id=call_id)


CALLS = message("assistant", tool_calls=[call("bash", "1"), call("read", "2"), call("bash", "3")])


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([message("user", content="a")], ()),
        ([message("tool", content="a", tool_call_id="1")], ()),
        ([CALLS, message("tool", content="x", tool_call_id="1")], ("bash",)),
        ([CALLS, *[message("tool", content="x", tool_call_id=n) for n in "213"]], ("read", "bash")),
        ([CALLS, message("tool", content="x", tool_call_id="1"), message("user", content="a")], ()),
        ([CALLS, message("tool", content="x", tool_call_id="9")], ()),
        ([CALLS, message("tool", content="x", name="told")], ("told",)),
        ([CALLS, message("tool", content="x", name="x" * 65)], ()),
        ([CALLS, message("tool", content="x", name="no spaces\n")], ()),
        ([message("assistant", content="a"), *[message("tool", content="x", name=f"t{n}") for n in range(99)]],
         tuple(f"t{n}" for n in range(16))),
    ],
)  # fmt: skip
def test_which_tools_were_answered(messages: list[ChatMessage], names: tuple[str, ...]) -> None:
    assert answered_tools(messages) == names


def test_tool_pauses_are_known_by_the_tool(own: RunningServer) -> None:
    client = client_of(own, session="s", tenant="t")
    messages: list[Any] = [SYSTEM]
    client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=5)
    calls = [{"id": "1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}]
    messages += [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=5)
    engine = own.client._transport._loop.engine  # type: ignore[attr-defined]
    pauses = engine.tenancy.sessions.pauses._tenants["t"]
    assert list(pauses.by_tool) == ["bash"]
    assert len(pauses.all.ascending_s) == 1


# -- bounds -------------------------------------------------------------------------------------------


def at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    """Results or errors of functions that run at the same time."""
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except openai.APIStatusError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_a_tenant_over_its_bound_gets_429_and_others_are_served() -> None:
    with running_server(delay_s=0.02, tenants=["flood:max_num_running=1,max_num_waiting=2"]) as server:
        flood, other = client_of(server, tenant="flood"), client_of(server, tenant="other")

        def ask(client: openai.OpenAI, stream: bool = False) -> Callable[[], Any]:
            return lambda: client.completions.create(model=MODEL_NAME, prompt="a", max_tokens=20, stream=stream)

        results = at_once([*[ask(flood, stream=index % 2 == 1) for index in range(9)], ask(other)])
        refused = [result for result in results if isinstance(result, openai.RateLimitError)]
        assert len(refused) == 6
        assert all(error.code == "rate_limit_exceeded" for error in refused)
        assert all(error.type == "rate_limit_error" for error in refused)
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
        assert results[-1].choices[0].text
        metrics = samples(httpx2.get(f"{server.url}/metrics").text)
        assert metrics["pelton:admission_rejections_total", (("reason", "rate_limit_exceeded"),)] == 6


def test_a_deadline_out_of_reach_gets_429_at_once(own: RunningServer) -> None:
    client = client_of(own)

    def ask(timeout_s: float) -> Callable[[], Any]:
        body = {"timeout_s": timeout_s}
        return lambda: client.completions.create(model=MODEL_NAME, prompt="a" * 900, max_tokens=5, extra_body=body)

    results = at_once([ask(10_000.0), ask(10_000.0), ask(10.0)])
    # Alone it would be tried; beside another it is refused.
    late = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert len(late) <= 1
    assert all(error.code == "deadline_unreachable" for error in late)
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in late)


# -- metrics ------------------------------------------------------------------------------------------


def test_metrics_by_tenant(own: RunningServer) -> None:
    converse(client_of(own, tenant="alice", session="s"), 2)
    converse(client_of(own, tenant="bob"), 1)
    (session,) = sessions_of(own, "alice")
    value = samples(httpx2.get(f"{own.url}/metrics").text)
    alice, bob = (("tenant", "alice"),), (("tenant", "bob"),)
    assert value["pelton:tenant_sessions", alice] == value["pelton:tenant_sessions", bob] == 1
    assert value["pelton:tenant_pinned_blocks", alice] == session["num_pinned_blocks"]
    assert value["pelton:tenant_pinned_blocks", bob] == 0
    assert value["pelton:tenant_service_total", alice] > value["pelton:tenant_service_total", bob] > 40
    assert value["pelton:tenant_pinned_block_seconds_total", alice] > 0
    assert value["pelton:tenant_requests_running", alice] == value["pelton:tenant_requests_waiting", alice] == 0
    assert value["pelton:fairness_gap", ()] == 0
    assert value["pelton:sessions", ()] == 2
    assert value["pelton:pins", ()] == 1
    assert value["pelton:pins_ended_total", (("reason", "superseded"),)] == 1


def test_questions_need_an_engine_and_metrics_do_not() -> None:
    with running_server(start_engine=False) as server:
        for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/sessions/a")):
            response = httpx2.request(method, f"{server.url}{path}")
            assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        assert httpx2.get(f"{server.url}/metrics").status_code == 200
        assert httpx2.get(f"{server.url}/v1/requests/a/timeline").status_code == 404
