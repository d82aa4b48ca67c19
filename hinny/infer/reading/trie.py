"""What requests have in common: their tokens as a trie, in which every shared prefix stands once.

A request needs the model to read its path: context and continuation without the last token, or a prompt. A node is a
run of tokens between two places where something happens: where paths part, where a prompt to be continued ends, or
where nothing follows. So a node is all that must be read in one go, and a state is needed only behind nodes that have
children or writers: these are the checkpoints, known before the model reads anything.

A place where something is only scored makes no node: what is wanted there is a `Want` of the node that it lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hinny.infer.reading.requests import Generate, Score

Request = Score | Generate


@dataclass(frozen=True)
class Want:
    """The model's word on what follows positions begin .. end - 1 of a request's path."""

    request: int
    begin: int
    end: int


@dataclass(eq=False)
class Node:
    """Tokens begin .. end - 1 of the path of request `path`, and of all requests below."""

    path: int
    begin: int
    end: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    """Requests that write behind the node's end, if at least one of them writes more than a token."""

    @property
    def length(self) -> int:
        """Tokens to read."""
        return self.end - self.begin

    @property
    def kept(self) -> bool:
        """Whether the state behind it is needed."""
        return bool(self.children or self.writers)


class Trie:
    """The nodes of all requests, and the tokens that they must read."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.paths = [np.array(path(request), dtype=">i4") for request in requests]
        self.root = Node(path=-1, begin=0, end=0, parent=None)
        ends = self._grow()
        self._contract(ends)
        for i, end in enumerate(ends):
            self._mark(i, end)

    def tokens(self, node: Node, begin: int, end: int) -> np.ndarray:
        """Tokens begin .. end - 1 on the way to the end of `node`."""
        return self.paths[node.path][begin:end].astype(np.int64)

    def nodes(self) -> list[Node]:
        """All nodes but the root, parents first."""
        found, open_nodes = [], [self.root]
        while open_nodes:
            node = open_nodes.pop()
            found += node.children
            open_nodes += node.children
        return found

    def _grow(self) -> list[Node]:
        """Hang all paths into the trie; the node at which each ends."""
        # big-endian bytes are ordered as the tokens are, a prefix before what it begins
        order = sorted(range(len(self.paths)), key=lambda i: self.paths[i].tobytes())
        ends: list[Node] = [self.root] * len(self.paths)
        last, stack = np.empty(0, dtype=">i4"), [self.root]
        for i in order:
            own = self.paths[i]
            shared = common(last, own)
            below = None
            while stack[-1].end > shared:
                below = stack.pop()
            if below is not None and stack[-1].end < shared:
                stack.append(_split(below, shared))
            if len(own) > shared:
                leaf = Node(path=i, begin=shared, end=len(own), parent=stack[-1])
                stack[-1].children.append(leaf)
                stack.append(leaf)
            ends[i], last = stack[-1], own
        checkpoints = {end for end, request in zip(ends, self.requests, strict=True) if goes_on(request)}
        for i, (end, request) in enumerate(zip(ends, self.requests, strict=True)):
            if end in checkpoints and isinstance(request, Generate):
                end.writers.append(i)
        return ends

    def _contract(self, ends: list[Node]) -> None:
        """Join every node at which nothing happens with its one child."""
        gone: dict[Node, Node] = {}
        for node in [*reversed(self.nodes()), self.root]:
            for i, child in enumerate(node.children):
                if len(child.children) == 1 and not child.writers:
                    gone[child] = node.children[i] = only = child.children[0]
                    only.begin, only.parent = child.begin, node
        for i, end in enumerate(ends):
            while end in gone:
                end = gone[end]
            ends[i] = end

    def _mark(self, request: int, node: Node) -> None:
        """Note in the nodes on the way to a path's end what the request wants to know there."""
        begin, stop = wanted(self.requests[request])
        while stop > begin:
            node.wants.append(Want(request, max(begin, node.begin), min(stop, node.end)))
            stop = node.begin
            assert node.parent is not None
            node = node.parent


def path(request: Request) -> tuple[int, ...]:
    """The tokens that the model must read: not the last of a continuation, which nothing is asked about."""
    return request.prompt if isinstance(request, Generate) else request.context + request.continuation[:-1]


def wanted(request: Request) -> tuple[int, int]:
    """The positions of its path (begin, end) whose next token matters."""
    if isinstance(request, Generate):
        return len(request.prompt) - 1, len(request.prompt)
    begin = len(request.context) - 1
    return begin, begin + len(request.continuation)


def goes_on(request: Request) -> bool:
    """Whether a state is needed behind its path: the first new token is read off the prompt's last position."""
    return isinstance(request, Generate) and request.max_tokens > 1


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _split(node: Node, at: int) -> Node:
    """Cut a node that is the last child of its parent at position `at`; the new upper part."""
    parent = node.parent
    assert parent is not None
    assert parent.children[-1] is node
    upper = Node(path=node.path, begin=node.begin, end=at, parent=parent, children=[node])
    parent.children[-1] = upper
    node.begin, node.parent = at, upper
    return upper
