"""Benchmarks: qmpd beside its peers, in the same minute on the same machine.

``python -m bench`` (or ``make bench``) runs every suite named in ``__main__``
and prints a Markdown table.  A suite is a module with ``run(settings)``; the
servers are in ``servers``, the client that loads them in ``load``, medians and
the table in ``table``.  Nothing here asserts anything: that is for tests.
"""
