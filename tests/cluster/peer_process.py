"""Has the blocks of `make.KEYS` without an engine.   usage: python -m tests.cluster.peer_process JSON

`problem`: "damage" and "cut" change a block between its checksum and its reading; "die" ends the process by SIGKILL
when it is asked the second time; "hang" leaves questions without an answer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import pelton.cluster.transfer.outlet as outlet_module
from pelton.cluster.transfer.checksum import checksums
from pelton.core.protocols import WantedBlocks
from tests.cluster.make import content, make_connector, put


class Source:
    def __init__(self, path: str, problem: str = "", num_slots: int = 8, **settings: Any) -> None:
        self.problem = problem
        self.woken = threading.Event()
        self.num_asked = 0
        outlet_module.checksums = self.checksums
        self.connector = make_connector(num_slots, kv_listen=f"unix:{path}", **settings)
        self.free = list(range(num_slots))
        self.connector.wake_with(self.woken.set)

    def checksums(self, slots: Any, slot_ids: Any) -> list[bytes]:
        found = checksums(slots, slot_ids)
        if self.problem == "damage":
            slots[slot_ids[1]][77] ^= 1
        elif self.problem == "cut":
            slots[slot_ids[1]][5000:] = 0
        return found

    def run(self) -> None:
        while True:
            self.woken.wait()
            self.woken.clear()
            for wanted in self.connector.take_wanted():
                self.answer(wanted)

    def answer(self, wanted: WantedBlocks) -> None:
        self.num_asked += 1
        if self.problem == "hang":
            return
        if self.problem == "die" and self.num_asked == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        slot_ids = []
        for key in wanted.keys[: len(self.free)]:
            if key[0] == 0:
                slot_ids.append(self.free.pop())
                put(self.connector.outbox, slot_ids[-1], content(key))
        wanted.taken.add_done_callback(lambda _: self.free.extend(slot_ids))
        wanted.offer.set_result(tuple(slot_ids))


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if (fake_cuda := options.pop("fake_cuda", None)) is not None:
        from tests.cluster.fake_cuda import use

        use(fake_cuda)
    source = Source(**options)
    threading.Thread(target=source.run, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    source.connector.close()
