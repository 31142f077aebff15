"""What a device has of a node: a backend, and what the device says about it to a client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block.backend import Backend
from qmpd.qom.latency import TimedAccounting

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.permissions import Permission


class GuestDisk(Backend):
    """A guest's disk.

    :param removable: the guest takes the medium for removable.
    :param write_cache: the guest is told of a write cache.
    :param stops_on_error: a failed request of the guest may stop the machine.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        qdev: str,
        device_id: str | None,
        perm: Permission,
        shared: Permission,
        removable: bool,
        write_cache: bool,
        stops_on_error: bool,
    ) -> None:
        super().__init__(graph, qdev=qdev, device_id=device_id, perm=perm, shared=shared)
        self.accounting: TimedAccounting = TimedAccounting()
        self.removable = removable
        self.write_cache = write_cache
        self.stops_on_error = stops_on_error
