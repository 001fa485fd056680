"""The waiting requests of one tenant in the order of a key."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from pelton.core.request import Request

Key = tuple[float, ...]


class OrderedWaiting:
    """Sorted list; a key must not change while its request waits. Ties go to who came first."""

    __slots__ = ("_entries", "_key", "_num_added", "_ranks_by_id")

    def __init__(self, key: Callable[[Request], Key]) -> None:
        self._key = key
        self._entries: list[tuple[Key, int, Request]] = []
        self._ranks_by_id: dict[str, tuple[Key, int]] = {}
        self._num_added = 0

    def add(self, request: Request) -> int:
        """Returns the place that the request got, 0 for the first."""
        self._num_added += 1
        rank = (self._key(request), self._num_added)
        self._ranks_by_id[request.request_id] = rank
        entries = self._entries
        if not entries or entries[-1][:2] < rank:  # the usual one
            entries.append((*rank, request))
            return len(entries) - 1
        insort(entries, (*rank, request), key=_rank)
        return bisect_left(entries, rank, key=_rank)

    def remove(self, request: Request) -> None:
        rank = self._ranks_by_id.pop(request.request_id)
        del self._entries[bisect_left(self._entries, rank, key=_rank)]

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._ranks_by_id

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._entries)

    def __getitem__(self, index: int) -> Request:
        return self._entries[index][2]

    def key_at(self, index: int) -> Key:
        return self._entries[index][0]

    def __len__(self) -> int:
        return len(self._entries)


def _rank(entry: tuple[Key, int, Request]) -> tuple[Key, int]:
    return entry[0], entry[1]
