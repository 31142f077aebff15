"""A long computation in steps, so that whoever runs it may stop between any two, or let others go first.

It is a generator that yields nothing where a step ends and returns the result.  Closing it between two
steps is how it is stopped: what its ``with`` and ``finally`` are for is then done, so keys are wiped.
Steps within steps are ``yield from``.

How long a step is depends on what it does.  One derivation of a key can't be divided: no library that
there is begins a PBKDF2 in the middle, for what it would have to be given is not a salt.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]


def run(steps: Steps[T]) -> T:
    """Take all the steps at once; what they return or raise."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
