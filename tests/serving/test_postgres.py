"""What is stored through HTTP with PostgreSQL behind it: the tests of SQLite, on another server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pelton.serving.config import ServerConfig
from pelton.store.config import StoreConfig
from tests.postgres import Postgres
from tests.serving.make import RunningServer, running_server
from tests.serving.test_background_responses import (  # noqa: F401
    restart_between,
    test_deleting_one_that_runs_ends_it,
    test_it_can_be_cancelled,
    test_it_runs_by_itself,
    test_its_events_can_be_read_again,
)
from tests.serving.test_batches import (  # noqa: F401
    client,
    kill_and_restart,
    test_a_file_comes_and_goes,
    test_a_tenants_files_are_bounded,
    test_cancelling_keeps_what_is_done,
    test_each_bad_line_is_an_error_line,
    test_every_line_is_answered_once,
    test_pages,
    test_tenants_do_not_see_each_other,
    test_what_is_unfinished_expires,
)
from tests.serving.test_responses import (  # noqa: F401
    test_a_conversation_goes_on_from_a_response,
    test_a_response,
    test_an_item_can_be_referred_to,
    test_input_items_are_listed,
    test_tenants_see_only_their_own,
    test_the_events_of_a_stream,
)
from tests.serving.test_stored_chat import (  # noqa: F401
    test_a_stored_answer_is_retrieved_changed_and_deleted,
    test_pages_and_filters,
    test_what_was_sent_is_listed,
)


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = ServerConfig(max_batch_lines=50, max_file_bytes=100_000, max_stored_bytes=1_000_000)
    store = StoreConfig(data_dir=str(tmp_path_factory.mktemp("data")), database_url=postgres.new_database())
    with running_server(config=config, store=store) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    store = StoreConfig(data_dir=str(tmp_path_factory.mktemp("slow")), database_url=postgres.new_database())
    with running_server(delay_s=0.01, store=store, config=ServerConfig(batch_concurrency=2)) as server:
        yield server


@pytest.fixture(scope="module")
def slow(slow_server: RunningServer) -> RunningServer:
    return slow_server


@pytest.fixture(scope="module")
def openai_client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_batch_over_kill_9_and_restart(tmp_path: Path, postgres: Postgres) -> None:
    kill_and_restart(tmp_path, postgres.new_database())


def test_responses_over_a_restart(tmp_path: Path, postgres: Postgres) -> None:
    restart_between(StoreConfig(data_dir=str(tmp_path), database_url=postgres.new_database()))
