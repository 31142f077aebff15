"""The numbers of the NBD protocol (proto.md, section "Values")."""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from typing import Final

# -- handshake (sections "Newstyle negotiation" and "Handshake phase")

NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

FIXED_NEWSTYLE: Final = 1 << 0
NO_ZEROES: Final = 1 << 1

#: Magic, option, length of what follows.
OPTION: Final = struct.Struct(">8sII")
#: Magic, option, kind of reply, length of what follows.
OPTION_REPLY: Final = struct.Struct(">QIII")

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = (1 << 31) + 1
REP_ERR_POLICY: Final = (1 << 31) + 2
REP_ERR_INVALID: Final = (1 << 31) + 3
REP_ERR_TLS_REQD: Final = (1 << 31) + 5
REP_ERR_UNKNOWN: Final = (1 << 31) + 6
REP_ERR_SHUTDOWN: Final = (1 << 31) + 7
REP_ERR_BLOCK_SIZE_REQD: Final = (1 << 31) + 8
REP_ERR_TOO_BIG: Final = (1 << 31) + 9
REP_ERR_EXT_HEADER_REQD: Final = (1 << 31) + 10

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# -- transmission flags

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

# -- transmission (section "Transmission phase")

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

REPLY_FLAG_DONE: Final = 1 << 0

REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR: Final = (1 << 15) + 1

#: The extents' bits in `base:allocation`.
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

#: What a system's error is on the wire, in QEMU as here; any other is EINVAL.
_ERRORS: Final[Mapping[int, int]] = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.EOPNOTSUPP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}


def error_number(error: OSError) -> int:
    """The error on the wire for one of the system's."""
    return _ERRORS.get(error.errno or 0, EINVAL)


# -- sizes

#: A string (an export's name, its description, a context's name) has at most this many bytes
#: (section "Values").
MAX_STRING: Final = 4096
#: The preferred block size, in bytes (section "Size constraints").
PREFERRED_BLOCK: Final = 4096
#: The largest payload, in bytes: 2^25, which the same section recommends.
MAX_PAYLOAD: Final = 32 << 20
