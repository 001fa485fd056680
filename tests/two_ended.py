"""How `make test` shares the tests out among processes: by file, from both ends of the line."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling


class TwoEndedScheduling(LoadFileScheduling):  # type: ignore[misc]
    """The first process takes files from the front of the line, the others from its end.

    In front are those of the real model: they take gigabytes and want every core, so two at once would only
    be in each other's way, while the others leave a core to them.
    """

    def _assign_work_unit(self, node: Any) -> None:
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
