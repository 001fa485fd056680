"""The waiting requests in the order of a key: what fcfs and priority have in common."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from pelton.core.request import Request

Key = tuple[float, ...]


class OrderedWaiting:
    """Sorted list; a key must not change while its request waits. Ties go to who came first."""

    def __init__(self, key: Callable[[Request], Key]) -> None:
        self._key = key
        self._entries: list[tuple[Key, int, Request]] = []
        self._keys_by_id: dict[str, tuple[Key, int]] = {}
        self._num_added = 0

    def add(self, request: Request) -> None:
        self._num_added += 1
        rank = (self._key(request), self._num_added)
        self._keys_by_id[request.request_id] = rank
        insort(self._entries, (*rank, request), key=_rank)

    def remove(self, request: Request) -> None:
        rank = self._keys_by_id.pop(request.request_id)
        del self._entries[bisect_left(self._entries, rank, key=_rank)]

    def __iter__(self) -> Iterator[Request]:
        """In order; the request just given may be removed meanwhile."""
        index = 0
        while index < len(self._entries):
            request = self._entries[index][2]
            yield request
            index += request.request_id in self._keys_by_id

    def __len__(self) -> int:
        return len(self._entries)


def _rank(entry: tuple[Key, int, Request]) -> tuple[Key, int]:
    return entry[0], entry[1]
