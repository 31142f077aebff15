from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpd.export.nbd.budget import LEAST, PIECE, Budget

TOTAL = 8 << 20


def test_a_client_alone_may_have_all_of_it_but_a_piece_at_a_time() -> None:
    share = Budget(TOTAL).enter()
    for _ in range(8):
        assert share.room == PIECE
        share.take(PIECE)
    assert share.room == 0
    share.give(PIECE)
    assert share.room == PIECE


def test_the_more_clients_the_less_for_each() -> None:
    budget = Budget(TOTAL)
    first, _second = budget.enter(), budget.enter()
    for _ in range(4):
        first.take(PIECE)
    assert first.room == 0
    budget.leave()
    assert first.room == PIECE


@given(st.lists(st.tuples(st.integers(0, 19), st.booleans()), max_size=200))
def test_the_bound_holds_and_who_holds_nothing_may_always_begin(steps: list[tuple[int, bool]]) -> None:
    budget = Budget(TOTAL)
    shares = [budget.enter() for _ in range(20)]
    taken: list[list[int]] = [[] for _ in shares]
    for number, more in steps:
        share = shares[number]
        if more and share.room:
            taken[number].append(share.room)
            share.take(share.room)
        elif taken[number]:
            share.give(taken[number].pop())
        assert share.held == sum(taken[number])
        assert share.room >= LEAST - share.held
        assert budget.used <= TOTAL + LEAST * len(shares)
    assert budget.used == sum(share.held for share in shares)
