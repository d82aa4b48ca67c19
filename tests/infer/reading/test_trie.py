"""A trie holds every request's tokens once, and cuts them only where a state is needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hinny.infer.reading.requests import Generate, Score
from hinny.infer.reading.trie import Node, Request, Trie, goes_on, path, wanted

few = st.lists(st.integers(0, 2) | st.just(70_000), min_size=1, max_size=8).map(tuple)
requests_of_few = st.lists(st.builds(Score, few, few) | st.builds(Generate, few, st.integers(1, 2)), max_size=12)


def way(node: Node) -> list[Node]:
    """The nodes from the root's child to `node`."""
    return [*way(node.parent), node] if node.parent is not None else []


@given(requests_of_few)
def test_every_path_is_in_it_and_every_prefix_once(requests: list[Request]) -> None:
    trie = Trie(requests)
    prefixes = {path(request)[:n] for request in requests for n in range(1, len(path(request)) + 1)}
    nodes = trie.nodes()
    assert sum(node.length for node in nodes) == len(prefixes)
    assert {tuple(trie.tokens(node, 0, n)) for node in nodes for n in range(node.begin + 1, node.end + 1)} == prefixes
    for node in nodes:
        assert node.begin == (node.parent.end if node.parent is not trie.root else 0)
        assert any(child is node for child in node.parent.children)
        assert node.length > 0


@given(requests_of_few)
def test_a_node_ends_only_where_paths_part_or_writing_begins(requests: list[Request]) -> None:
    for node in Trie(requests).nodes():
        assert len(node.children) != 1 or node.writers
        firsts = [Trie(requests).tokens(child, child.begin, child.begin + 1)[0] for child in node.children]
        assert len(set(firsts)) == len(firsts)


@given(requests_of_few)
def test_wants_and_writers_are_where_their_requests_say(requests: list[Request]) -> None:
    trie = Trie(requests)
    places: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    for node in trie.nodes():
        for want in node.wants:
            assert node.begin <= want.begin < want.end <= node.end
            assert tuple(trie.tokens(node, 0, want.end)) == path(requests[want.request])[:want.end]
            places[want.request] += range(want.begin, want.end)
        for i in node.writers:
            assert tuple(trie.tokens(node, 0, node.end)) == requests[i].prompt
    assert {i: sorted(found) for i, found in places.items()} == {
        i: list(range(*wanted(request))) for i, request in enumerate(requests)}
    long = {path(request) for request in requests if goes_on(request)}
    assert sorted(i for node in trie.nodes() for i in node.writers) == [
        i for i, request in enumerate(requests) if isinstance(request, Generate) and request.prompt in long]


def shape(node: Node) -> list:
    """Lengths, as nested lists."""
    return [node.length, *sorted(shape(child) for child in node.children)]


@pytest.mark.parametrize(("requests", "shapes"), [
    # a context that begins another, and a continuation that reaches into a context: one node
    ([Score((1, 2), (3, 4)), Score((1, 2, 3, 4, 5), (6,))], [[5]]),
    # letters behind one context
    ([Score((1, 2, 3), (4,)), Score((1, 2, 3), (5,))], [[3]]),
    # choices that part behind their first token
    ([Score((1, 2), (3, 4, 9)), Score((1, 2), (3, 5, 9))], [[3, [1], [1]]]),
    # a prompt inside a longer one is a checkpoint, but not if it is for one token
    ([Generate((1, 2), 5), Generate((1, 2, 3), 5)], [[2, [1]]]),
    ([Generate((1, 2), 1), Generate((1, 2, 3), 5)], [[3]]),
    ([Generate((1, 2), 5), Score((1, 2), (3,)), Generate((7,), 5)], [[1], [2]]),
])
def test_the_shape_of_small_tries(requests: list[Request], shapes: list) -> None:
    assert sorted(shape(child) for child in Trie(requests).root.children) == shapes
