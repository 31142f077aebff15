"""The driver `qcow2`: QEMU's copy-on-write format, versions 2 and 3.

The format's tables are pure code, a module for each section of the specification:
`header`, `mapping` (L1 and L2 tables), `refcounts` and `snapshots`.  What
moves bytes is apart from them: `metadata` keeps tables in memory and writes them
back in an order that a crash can't hurt, `overlap` says where guests' data may not
go, and `driver` is the node.

Source: "qcow2 image format", the specification that QEMU publishes
(docs/interop/qcow2.rst); the modules name its sections.
"""
