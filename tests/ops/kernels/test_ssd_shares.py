"""Walks of SSD shared out evenly over a Hopper GPU: when, who walks what in which order, how a state is handed on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from hinny.ops.kernels import launches, ssd_call, ssd_compilations
from hinny.ops.kernels.compile import compile_for
from hinny.ops.kernels.hopper_forward import piece


def pieces(begin: int, stop: int, chunks: int) -> list[tuple[int, int, int]]:
    """What the kernel takes of [begin, stop): its own function, which is plain Python where it is not compiled."""
    found = []
    while begin < stop:
        found.append(piece.fn(begin, stop, chunks))
        stop -= found[-1][2] - found[-1][1]
    return found


@given(walks=st.integers(1, 400), chunks=st.integers(1, 40), slots=st.integers(1, 300))
def test_shares_hold_every_chunk_once_and_states_are_handed_on_in_time(walks: int, chunks: int, slots: int) -> None:
    length = ssd_call.equal_share(walks, chunks, slots)
    if not length:
        return
    line = walks * chunks
    shares = [pieces(at, min(at + length, line), chunks) for at in range(0, line, length)]
    assert len(shares) <= slots
    taken = [(walk, c) for share in shares for walk, first, last in share for c in range(first, last)]
    assert sorted(taken) == [(walk, c) for walk in range(walks) for c in range(chunks)]
    begun = {walk: (i, share.index((walk, first, last)), last) for i, share in enumerate(shares)
             for walk, first, last in share if first == 0 and last < chunks}
    for i, share in enumerate(shares):
        for place, (walk, first, last) in enumerate(share):
            if first > 0:
                assert begun.pop(walk) == (i - 1, 0, first), "the program before begins it, and with it"
                assert (place, last) == (len(share) - 1, chunks), "this one ends it, and with it"
                assert i == len(shares) - 1 or sum(b - a for _, a, b in share[:-1]) >= first
    assert not begun


@given(walks=st.integers(1, 5000), chunks=st.integers(1, 600), slots=st.integers(1, 400))
def test_walks_are_shared_out_where_rounds_of_them_take_longer(walks: int, chunks: int, slots: int) -> None:
    length = ssd_call.equal_share(walks, chunks, slots)
    rounds = -(-walks // slots) * chunks
    assert length == 0 or chunks <= length < rounds / ssd_call.WORTH_SHARING
    assert length > 0 or walks <= slots or rounds <= ssd_call.WORTH_SHARING * (walks * chunks / slots + 2)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launches of an H100."""
    launches.forget()
    monkeypatch.setattr(launches, "generation", lambda device: "sm90")
    monkeypatch.setattr(ssd_call, "processors", lambda device: 132)
    yield
    launches._known.clear()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("b", "t", "h", "g", "share"), [
    (16, 2048, 24, 1, 47), (16, 1000, 24, 1, 24), (16, 2048, 24, 8, 0), (4, 4096, 128, 8, 0), (1, 32768, 128, 8, 0),
    (11, 2048, 24, 1, 0)])
def test_the_sizes_that_are_shared_out(b: int, t: int, h: int, g: int, share: int) -> None:
    """Neither where B and C are too large to stay near, nor where rounds are full or one is enough."""
    x, B = (torch.empty(b, t, *sizes, dtype=torch.bfloat16, device="meta") for sizes in ((h, 64), (g, 128)))
    assert ssd_call.Call("hopper_forward", x, B).share(1) == share


def test_a_state_is_released_by_all_threads_and_acquired_before_it_is_read() -> None:
    """One thread raises the flag after a barrier of the warpgroup behind all stores, and one reads it; all loads of
    the state come after the barrier that spreads the answer, and not from a cache that others' stores do not reach."""
    case, = (case for case in ssd_compilations.compilations("sm90")
             if case.name == "hopper_forward-n128-blocks1-local-local_sums")
    lines = [line.strip() for line in compile_for("sm90", case).assembly["ptx"].splitlines()]
    code = [line for line in lines if re.match(r"(@%p\d+ )?(bar\.|st\.global|ld\.global|atom\.|bra)", line)]
    asked, = (i for i, line in enumerate(code) if ".acquire" in line)
    raised, = (i for i, line in enumerate(code) if ".release" in line)
    assert re.match(r"@%p\d+ ld\.global\.gpu\.acquire", code[asked])
    assert re.match(r"@%p\d+ atom\.global\.gpu\.release\.exch", code[raised])
    assert code[asked + 1].startswith("bar.sync")
    assert all(".cg." in line for line in code[asked + 3:asked + 35]), "64 numbers a thread, 2 at a time"
    before = [line for line in code[:raised] if "bra" not in line]
    assert before[-1] == code[asked + 1] == "bar.sync \t0, 128;"
    assert all(line.startswith("st.global.v2") for line in before[-33:-1])
