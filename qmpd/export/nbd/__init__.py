"""The NBD protocol's server side.

Source of everything here is the NBD project's protocol document
(``doc/proto.md``), cited as *proto.md* with the section's title.

- :mod:`~qmpd.export.nbd.wire`: its numbers.
- :mod:`~qmpd.export.nbd.handshake`: option haggling as a table of states; no I/O.
- :mod:`~qmpd.export.nbd.transmission`: requests taken apart, replies put together; no I/O.
- :mod:`~qmpd.export.nbd.connection`: one client, on asyncio.
- :mod:`~qmpd.export.nbd.server`: listening sockets.
"""
