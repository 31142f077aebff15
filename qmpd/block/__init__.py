"""The block graph: nodes, the edges between them, permissions, image locks.

Nodes form a directed graph.  Each is an instance of a driver (`drivers/`),
each edge says what its parent needs of the child and what it lets others do.
Nothing here knows of QMP or of where a passphrase comes from.
"""
