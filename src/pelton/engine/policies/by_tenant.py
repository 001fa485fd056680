"""What every policy has: a queue, caps and accounts for each tenant, and a line of tenants."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from pelton.core.batch import NULL_BLOCK_ID
from pelton.core.events import TenantStats
from pelton.core.request import Request, RequestStatus
from pelton.core.tenant import TenantSettings
from pelton.engine.policies.context import PolicyContext
from pelton.engine.policies.ordered_waiting import Key, OrderedWaiting

# Service of one token: an output token costs about two of input (VTC, arXiv 2401.00588, section 3.1).
INPUT_TOKEN_SERVICE = 1.0
OUTPUT_TOKEN_SERVICE = 2.0
# Beyond these, accounts of the longest idle are forgotten: names come from clients.
MAX_NUM_TENANTS = 10_000
KV_CHARGE_INTERVAL_S = 1.0
# Service for a pinned block a second, at least: kept for as many seconds as it has tokens, it costs its recompute.
PIN_CHARGE = 1.0


class Tenant:
    """A tenant's requests and account."""

    __slots__ = (
        "cursor",
        "entry",
        "is_at_share",
        "is_in_line",
        "num_output_service",
        "running",
        "service",
        "settings",
        "tenant_id",
        "virtual_service",
        "waiting",
    )

    def __init__(self, tenant_id: str, settings: TenantSettings, waiting: OrderedWaiting) -> None:
        self.tenant_id = tenant_id
        self.settings = settings
        self.waiting = waiting
        self.running: dict[str, Request] = {}
        self.service = 0.0  # all it was ever charged
        self.virtual_service = 0.0  # divided by weight, lifted after idling: the counter of VTC
        self.num_output_service = OUTPUT_TOKEN_SERVICE / settings.weight
        self.cursor = 0  # waiting requests that this step has refused
        self.is_in_line = False
        self.is_at_share = False  # of the KV cache: nothing starts until one of its requests gives up blocks
        self.entry: tuple[Key, int, Tenant] | None = None  # its place in the line

    @property
    def may_start(self) -> bool:
        """Something waits, and no cap of its own is in the way."""
        most = self.settings.max_num_running
        return len(self.waiting) > 0 and not self.is_at_share and (most is None or len(self.running) < most)

    @property
    def num_blocks(self) -> int:
        """KV blocks that its running requests name; a shared one counts for each."""
        return sum(
            len(table) - table.count(NULL_BLOCK_ID)
            for request in self.running.values()
            for table in request.block_tables
        )

    def charge(self, service: float) -> None:
        self.service += service
        self.virtual_service += service / self.settings.weight


class ByTenantPolicy:
    """Tenants stand in one line, by `tenant_key`; each has its own requests in order of `request_key`.

    The line is a heap whose entries may be out of date: a key that has grown is corrected when it comes
    to the front, one that has become smaller is entered anew.
    """

    def __init__(self, context: PolicyContext) -> None:
        self.context = context
        self.tenants: OrderedDict[str, Tenant] = OrderedDict()  # the longest idle first
        self._line: list[tuple[Key, int, Tenant]] = []
        self._num_entries = 0
        self._num_waiting = 0
        self._kv_charged_s = context.clock.now_s()

    # -- what a policy decides ----------------------------------------------------------------------

    def request_key(self, request: Request) -> Key:
        """Order inside a tenant, lower first; fixed while the request waits. Every policy has its own."""
        raise NotImplementedError

    def tenant_key(self, tenant: Tenant) -> Key:
        """Order of the tenants, lower first. May grow at any time; shrinks only with a new first request.

        `tenant.cursor` requests were refused in this step: the key is of the one after them.
        """
        return tenant.waiting.key_at(tenant.cursor)

    def enters(self, tenant: Tenant) -> None:
        """`tenant`, which had nothing that could start, now has."""

    def leaves(self, tenant: Tenant) -> None:
        """`tenant` has nothing more that could start."""

    def may_pass(self, tenant: Tenant, refused: Tenant) -> bool:  # noqa: ARG002
        """Whether requests of `tenant` may start though the first in line, of `refused`, found no room."""
        return True

    # -- requests come and go -----------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self._wait(request, self._tenant(request.tenant_id))

    def preempt(self, request: Request) -> None:
        tenant = self.tenants[request.tenant_id]
        del tenant.running[request.request_id]
        tenant.is_at_share = False
        self._wait(request, tenant)

    def admit(self, request: Request, num_cached_tokens: int) -> None:  # noqa: ARG002
        tenant = self.tenants[request.tenant_id]
        tenant.waiting.remove(request)
        self._num_waiting -= 1
        tenant.running[request.request_id] = request
        self._settle(tenant)

    def finish(self, request: Request) -> None:
        tenant = self.tenants[request.tenant_id]
        if request.status is RequestStatus.RUNNING:
            del tenant.running[request.request_id]
            tenant.is_at_share = False
        else:
            tenant.waiting.remove(request)
            self._num_waiting -= 1
        self._settle(tenant)
        if not tenant.running and not tenant.waiting:
            self.tenants.move_to_end(tenant.tenant_id)

    def charge_prefill(self, request: Request, num_tokens: int) -> None:
        self.tenants[request.tenant_id].charge(INPUT_TOKEN_SERVICE * num_tokens)

    def charge(self, tenant_id: str, num_output_tokens: int) -> None:
        tenant = self.tenants[tenant_id]
        tenant.service += OUTPUT_TOKEN_SERVICE * num_output_tokens
        tenant.virtual_service += tenant.num_output_service * num_output_tokens

    def charge_kv(self, tenant_id: str, num_block_seconds: float) -> None:
        self._tenant(tenant_id).charge(max(PIN_CHARGE, self.context.kv_charge) * num_block_seconds)

    def __len__(self) -> int:
        return self._num_waiting

    def tenant_stats(self) -> tuple[TenantStats, ...]:
        return tuple(
            TenantStats(
                tenant.tenant_id, len(tenant.running), len(tenant.waiting), tenant.service, tenant.virtual_service
            )
            for tenant in self.tenants.values()
        )

    # -- order --------------------------------------------------------------------------------------

    def waiting(self) -> Iterator[Request]:
        self._charge_held_kv()
        refused: list[Tenant] = []
        try:
            while (tenant := self._first()) is not None:
                if refused and not self.may_pass(tenant, refused[0]):
                    return
                request = tenant.waiting[tenant.cursor]
                if not self._has_share(tenant, request):
                    continue
                yield request
                if request in tenant.waiting:
                    refused.append(tenant)
                    tenant.cursor += 1
        finally:
            for tenant in refused:
                tenant.cursor = 0
            for tenant in refused:
                self._settle(tenant, moved=True)

    def order(self, running: list[Request]) -> None:
        running.sort(key=self.request_key)

    def precedes(self, waiting: Request, running: Request) -> bool:
        return self.request_key(waiting) < self.request_key(running)

    def narrow(self, num_tokens: int) -> int:
        return num_tokens

    def _has_share(self, tenant: Tenant, request: Request) -> bool:
        """Whether the tenant's part of the KV cache has room; if not, the tenant leaves the line until it has.

        Alone, a request may be larger than that part.
        """
        share = tenant.settings.max_kv_share
        if share < 1.0 and tenant.running:
            num_blocks = tenant.num_blocks + self.context.num_blocks_needed(request)
            tenant.is_at_share = num_blocks > share * self.context.num_blocks
            if tenant.is_at_share:
                self._settle(tenant)
        return not tenant.is_at_share

    def _first(self) -> Tenant | None:
        """The first tenant in line with something to start."""
        line = self._line
        while line:
            entry = line[0]
            tenant = entry[2]
            if entry is not tenant.entry:
                heappop(line)
            elif tenant.cursor >= len(tenant.waiting):  # all refused
                heappop(line)
                tenant.entry = None
            elif (key := self.tenant_key(tenant)) > entry[0]:
                tenant.entry = self._make_entry(key, tenant)
                heapreplace(line, tenant.entry)
            else:
                return tenant
        return None

    def _wait(self, request: Request, tenant: Tenant) -> None:
        self._num_waiting += 1
        place = tenant.waiting.add(request)
        self._settle(tenant, moved=place == 0)

    def _settle(self, tenant: Tenant, *, moved: bool = False) -> None:
        """Put the tenant where it belongs after a change; `moved`: its key may be smaller than before."""
        if not tenant.may_start:
            tenant.entry = None
            if tenant.is_in_line:
                tenant.is_in_line = False
                self.leaves(tenant)
            return
        if not tenant.is_in_line:
            self.enters(tenant)
            tenant.is_in_line = True
        elif not moved and tenant.entry is not None:
            return
        if tenant.cursor < len(tenant.waiting):
            tenant.entry = self._make_entry(self.tenant_key(tenant), tenant)
            heappush(self._line, tenant.entry)
            if len(self._line) > 2 * len(self.tenants) + 64:
                self._line = [entry for entry in self._line if entry is entry[2].entry]
                heapify(self._line)

    def _make_entry(self, key: Key, tenant: Tenant) -> tuple[Key, int, Tenant]:
        self._num_entries += 1
        return key, self._num_entries, tenant

    # -- victims ------------------------------------------------------------------------------------

    def choose_victim(self, running: Sequence[Request], beneficiary: Request) -> Request | None:
        """The last in order yields, whoever's it is."""
        victim = max(reversed(running), key=self.request_key, default=None)
        if victim is None or self.request_key(victim) < self.request_key(beneficiary):
            return None
        return victim

    def settings_changed(self, tenant_id: str) -> None:
        """Of a tenant, while it runs: its weight and its caps hold from now on."""
        tenant = self.tenants.get(tenant_id)
        if tenant is not None:
            tenant.settings = self.context.tenants.of(tenant_id)
            tenant.num_output_service = OUTPUT_TOKEN_SERVICE / tenant.settings.weight
            tenant.is_at_share = False
            self._settle(tenant, moved=True)

    # -- accounts -----------------------------------------------------------------------------------

    def _tenant(self, tenant_id: str) -> Tenant:
        tenant = self.tenants.get(tenant_id)
        if tenant is None:
            if len(self.tenants) >= MAX_NUM_TENANTS:
                self._forget_idle()
            settings = self.context.tenants.of(tenant_id)
            tenant = self.tenants[tenant_id] = Tenant(tenant_id, settings, OrderedWaiting(self.request_key))
        return tenant

    def _forget_idle(self) -> None:
        for tenant_id, tenant in self.tenants.items():
            if not tenant.running and not tenant.waiting:
                del self.tenants[tenant_id]
                return

    def _charge_held_kv(self) -> None:
        if not self.context.kv_charge:
            return
        now_s = self.context.clock.now_s()
        elapsed_s = now_s - self._kv_charged_s
        if elapsed_s >= KV_CHARGE_INTERVAL_S:
            self._kv_charged_s = now_s
            for tenant in self.tenants.values():
                if tenant.running:
                    tenant.charge(self.context.kv_charge * tenant.num_blocks * elapsed_s)
