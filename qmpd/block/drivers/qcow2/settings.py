"""What the options of BlockdevOptionsQcow2 mean, with QEMU's defaults and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmpd.block.drivers.qcow2 import overlap
from qmpd.block.drivers.qcow2.header import Compatible, Header
from qmpd.errors import Error

#: Bytes of L2 tables that are kept in memory unless the options say otherwise.
DEFAULT_L2_CACHE: Final = 32 << 20
#: The refcount blocks in memory take at least this many clusters, and by default so many bytes.
MIN_REFCOUNT_BLOCKS: Final = 4
DEFAULT_REFCOUNT_CACHE: Final = 1 << 20
#: An L2 table is read and kept in pieces of at most this many bytes.
DEFAULT_SLICE: Final = 64 << 10
#: More than this many bytes of cache are more than a machine has.
_MAX_CACHE: Final = 1 << 36


@dataclass(frozen=True)
class Settings:
    """The options of one node; sizes are bytes."""

    l2_cache: int
    refcount_cache: int
    slice_bytes: int
    lazy_refcounts: bool
    #: Discards that reach the file: of clusters that a guest gave up, of a deleted snapshot's, of others.
    pass_request: bool
    pass_snapshot: bool
    pass_other: bool
    #: Discarded clusters keep their place.
    discard_no_unref: bool
    overlap: frozenset[str]

    @classmethod
    def parse(cls, options: Mapping[str, Any], header: Header, *, unmap: bool) -> Settings:
        """The settings for an image.

        :param unmap: whether the node passes discards on.
        :raise Error: on options that can't be had, in QEMU's words.
        """
        l2_cache, refcount_cache = _cache_sizes(options, header)
        slice_bytes = options.get("l2-cache-entry-size", min(header.cluster_bytes, DEFAULT_SLICE))
        if not 512 <= slice_bytes <= header.cluster_bytes or slice_bytes & slice_bytes - 1:
            raise Error(
                "L2 cache entry size must be a power of two between 512 and the cluster size "
                f"({header.cluster_bytes})"
            )
        if options.get("cache-clean-interval", 0) > 0xFFFFFFFF:
            raise Error("Cache clean interval too big")
        lazy = options.get("lazy-refcounts", bool(header.compatible & Compatible.LAZY_REFCOUNTS))
        if lazy and header.version < 3:
            raise Error("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
        no_unref = options.get("discard-no-unref", False)
        if no_unref and header.version < 3:
            raise Error("discard-no-unref is only supported since qcow2 version 3")
        return cls(
            l2_cache=l2_cache,
            refcount_cache=refcount_cache,
            slice_bytes=slice_bytes,
            lazy_refcounts=lazy,
            pass_request=options.get("pass-discard-request", unmap),
            pass_snapshot=options.get("pass-discard-snapshot", True),
            pass_other=options.get("pass-discard-other", False),
            discard_no_unref=no_unref,
            overlap=overlap.sections_checked(options.get("overlap-check")),
        )


def _cache_sizes(options: Mapping[str, Any], header: Header) -> tuple[int, int]:
    """Bytes for L2 tables and for refcount blocks."""
    both, l2, counts = (options.get(f"{name}cache-size") for name in ("", "l2-", "refcount-"))
    smallest = MIN_REFCOUNT_BLOCKS * header.cluster_bytes
    if both is not None:
        if l2 is not None and counts is not None:
            raise Error("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        for name, part in (("l2-cache-size", l2), ("refcount-cache-size", counts)):
            if part is not None and part > both:
                raise Error(f"{name} may not exceed cache-size")
        if l2 is not None:
            counts = both - l2
        elif counts is not None:
            l2 = both - counts
        else:
            counts = min(both, smallest)
            l2 = both - counts
    if l2 is None:
        l2 = DEFAULT_L2_CACHE
    if counts is None:
        counts = max(smallest, DEFAULT_REFCOUNT_CACHE)
    whole_disk = header.l1_entries * header.cluster_bytes
    l2, counts = min(l2, whole_disk), max(counts, smallest)
    if l2 > _MAX_CACHE or counts > _MAX_CACHE:
        raise Error("Could not allocate metadata caches")
    return l2, counts
