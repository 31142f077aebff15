"""What a device has of a node: a backend, and what the device says about it to a client.

A request of the guest's that the storage fails is told of by BLOCK_IO_ERROR.
What happens to it is what the device's `rerror` and `werror` say, as far as that
makes sense without a machine: there is nobody to be stopped and nothing that
would be tried again when the machine goes on.  So where QEMU would stop the
machine the request fails, which is what the event says, and the I/O status in
`query-block` tells of it until a request of that kind goes well again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpd.block.backend import Backend
from qmpd.qom.latency import TimedAccounting

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.permissions import Permission

Emit = Callable[[str, dict[str, Any]], None]

#: What `auto` means, for reads and for all else.
_AUTO_READ: Final = "report"
_AUTO_WRITE: Final = "enospc"

#: A request that can't be done in a certain way is no failure: the client asks for it in another one.
_NO_FAILURES: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP})


class GuestDisk(Backend):
    """A guest's disk.

    :param qom_path: of the device, or of the half of it that does the work.
    :param values: the device's properties.
    :param emit: sends an event to clients.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        qdev: str,
        device_id: str | None,
        perm: Permission,
        shared: Permission,
        qom_path: str,
        values: Mapping[str, Any],
        emit: Emit,
    ) -> None:
        super().__init__(graph, qdev=qdev, device_id=device_id, perm=perm, shared=shared)
        self.accounting: TimedAccounting = TimedAccounting(
            count_invalid=values["account-invalid"] != "off", count_failed=values["account-failed"] != "off"
        )
        self.qom_path = qom_path
        #: The guest takes the medium for removable.
        self.removable: bool = values["removable"]
        #: The guest is told of a write cache.
        self.write_cache: bool = values["write-cache"] != "off"
        #: BlockDeviceIoStatus.
        self.io_status = "ok"
        self._rerror: str = _AUTO_READ if values["rerror"] == "auto" else values["rerror"]
        self._werror: str = _AUTO_WRITE if values["werror"] == "auto" else values["werror"]
        self._emit = emit
        #: The kind of request whose failure the I/O status tells of.
        self._failing: str | None = None

    @property
    def stops_on_error(self) -> bool:
        """Whether there is an I/O status: in QEMU a failed request may stop the machine."""
        return self._werror in ("enospc", "stop") or self._rerror == "stop"

    def succeeded(self, kind: str, size: int, took: int) -> None:
        """Count a request; the I/O status is good again if it was of the kind that failed."""
        super().succeeded(kind, size, took)
        if kind == self._failing:
            self.forget_failure()

    def forget_failure(self) -> None:
        """Call the I/O status good again."""
        self.io_status, self._failing = "ok", None

    def failed(self, kind: str, size: int, took: int, error: OSError) -> bool:
        """Count a request that failed, and do what the device's properties say."""
        if error.errno not in _NO_FAILURES and self._is_ignored(kind, error):
            super().succeeded(kind, size, took)
            return True
        return super().failed(kind, size, took, error)

    def _is_ignored(self, kind: str, error: OSError) -> bool:
        """Tell clients of a failure; returns whether the guest is not to hear of it."""
        reads = kind == "rd"
        policy = self._rerror if reads else self._werror
        no_space = error.errno == errno.ENOSPC
        if policy == "stop" or (policy == "enospc" and no_space):
            self.io_status, self._failing = "nospace" if no_space else "failed", kind
        ignored = policy == "ignore"
        self._emit(
            "BLOCK_IO_ERROR",
            {
                "device": self.name,
                # A long request may be told of after the node has gone.
                **({"node-name": self.node.name} if self.edge is not None else {}),
                "qom-path": self.qom_path,
                "operation": "read" if reads else "write",
                "action": "ignore" if ignored else "report",
                **({"nospace": no_space} if self.stops_on_error else {}),
                "reason": os.strerror(error.errno or errno.EIO),
            },
        )
        return ignored
