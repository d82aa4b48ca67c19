"""Prompts that begin alike: a tree of the tokens read before, with the states that were kept behind some of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from hinny.infer.marks import BLOCK, Marks, alike
from hinny.infer.pages import Memory

WORTH = 64
"""Shorter prefixes are not kept: reading so few tokens takes about as long as writing one."""
KNOWN_TOKENS = 1 << 20
"""Tokens of the tree beyond which earlier prompts without a state are forgotten."""


class Node:
    """Tokens between two branches of the tree; with an entry, the states behind the last of them."""

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], marks: tuple[bytes, ...]) -> None:
        """marks: those of the whole path that lie behind the parent."""
        self.parent, self.tokens, self.marks = parent, tokens, marks
        self.depth: int = len(tokens) + (parent.depth if parent else 0)
        self.children: dict[int, Node] = {}
        self.entry: Entry | None = None
        self.entries = 0
        """Here and below."""


@dataclass(frozen=True)
class Entry:
    """What is kept behind the tokens of a path."""

    pages: tuple[int, ...]
    slot: int | None
    """A snapshot; None for a model of attention alone, which can go on from any token of its pages."""


@dataclass(frozen=True)
class Match:
    """What the tree has for a prompt."""

    held: int = 0
    """Tokens that need not be read again."""
    entry: Entry | None = None
    """Whose pages hold them, and perhaps more; whose slot is the state behind exactly these."""
    known: int = 0
    """Tokens that an earlier prompt began with too, whether or not there is a state."""


class Prefixes:
    """The prefix cache: a radix tree over tokens. It holds rows of `memory` and gives back the least recently used.

    Whoever asks more than once for the same tokens has their marks (`Marks.of`): without, they are made each time.
    """

    def __init__(self, memory: Memory, *, recurrent: bool, most: int | None, worth: int = WORTH,
                 known_tokens: int = KNOWN_TOKENS) -> None:
        """recurrent: states of SSM layers cannot be cut back, so a prefix is of use only where a snapshot was taken.
        most: entries; None: as many as fit."""
        self.memory, self.recurrent, self.most, self.worth = memory, recurrent, most, worth
        self.known_tokens = known_tokens
        self.root = Node(None, (), ())
        self.tokens = 0
        self._kept: OrderedDict[Node, None] = OrderedDict()
        self._known: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, tokens: Sequence[int], most: int, marks: Sequence[bytes] | None = None) -> Match:
        """The longest usable prefix of at most so many tokens; its entry becomes the most recently used."""
        marks = Marks().of(tokens) if marks is None else marks
        node, known, best = self.root, 0, None
        while known < len(tokens) and (below := node.children.get(tokens[known])):
            same = alike(below.tokens, below.marks, tokens, marks, known)
            known += same
            node = below
            if same < len(below.tokens):
                break
            if node.entry and node.depth <= most:
                best = node
        held, known = best.depth if best else 0, min(known, most)
        if not self.recurrent and known:
            held, best = known, node
            while best.entry is None:
                best = next(child for child in best.children.values() if child.entries)
        if best is None or held < self.worth:
            return Match(known=known)
        self._kept.move_to_end(best)
        return Match(held, best.entry, known)

    def learn(self, tokens: Sequence[int], marks: Sequence[bytes] | None = None) -> None:
        """Remember a prompt without a state: where a later one leaves it, a snapshot will be worth its slot."""
        node = self._path(tokens, marks)
        self._known[node] = None
        self._known.move_to_end(node)
        while self.tokens > self.known_tokens and self._known:
            oldest, _ = self._known.popitem(last=False)
            self._prune(oldest)

    def lacks(self, tokens: Sequence[int], marks: Sequence[bytes] | None = None) -> bool:
        """Whether keeping a state behind exactly these tokens would add anything."""
        if self.most == 0 or len(tokens) < self.worth:
            return False
        marks = Marks().of(tokens) if marks is None else marks
        node, at = self.root, 0
        while at < len(tokens):
            below = node.children.get(tokens[at])
            if below is None:
                return True
            same = alike(below.tokens, below.marks, tokens, marks, at)
            if same < min(len(below.tokens), len(tokens) - at):
                return True
            node, at = below, at + same
        return not (node.depth == at and node.entry) if self.recurrent else not node.entries

    def keep(self, tokens: Sequence[int], pages: Sequence[int], slot: int | None,
             marks: Sequence[bytes] | None = None) -> None:
        """Hold the pages of these tokens and the snapshot behind them, which `lacks`; rows that somebody holds."""
        if self.most is not None and len(self._kept) >= self.most:
            self.forget_oldest(leaf=False)
        node = self._path(tokens, marks)
        assert node.entry is None, "kept already"
        if not self.recurrent:
            self._forget_above(node)
        self.memory.pages.keep(pages)
        if slot is not None:
            self.memory.slots.keep((slot,))
        node.entry = Entry(tuple(pages), slot)
        self._kept[node] = None
        self._count(node, 1)

    def make_place(self) -> bool:
        """Give back the oldest entry if there may be no more of them, and another one if its slot is needed for a new
        snapshot. Whether a slot is free."""
        if self.most is not None and len(self._kept) >= self.most:
            self.forget_oldest(leaf=False)
        return self.make_room(0, 1)

    def make_room(self, pages: int, slots: int) -> bool:
        """Give back entries until so many rows are free. Whether they are; if they cannot be, nothing is given."""
        memory = self.memory
        if memory.pages.available < pages or memory.slots.available < slots:
            return False
        while memory.slots.free < slots:
            self.forget_oldest(leaf=False)
        while memory.pages.free < pages:
            self.forget_oldest(leaf=True)
        return True

    def forget_oldest(self, leaf: bool) -> None:
        """Give back the least recently used entry; leaf: of those with none below, for an inner one frees no page."""
        self._forget(next(node for node in self._kept if not leaf or node.entries == 1))

    def clear(self) -> None:
        """Give everything back."""
        while self._kept:
            self._forget(next(iter(self._kept)))
        self.root, self.tokens = Node(None, (), ()), 0
        self._known.clear()

    def _path(self, tokens: Sequence[int], marks: Sequence[bytes] | None) -> Node:
        """The node that ends behind these tokens, made if need be."""
        marks = Marks().of(tokens) if marks is None else marks
        node, at = self.root, 0
        while at < len(tokens):
            below = node.children.get(tokens[at])
            if below is None:
                below = Node(node, tuple(tokens[at:]), tuple(marks[at // BLOCK:len(tokens) // BLOCK]))
                node.children[tokens[at]] = below
                self.tokens += len(below.tokens)
                return below
            same = alike(below.tokens, below.marks, tokens, marks, at)
            node, at = below if same == len(below.tokens) else _split(below, same), at + same
        return node

    def _forget(self, node: Node) -> None:
        entry = node.entry
        assert entry is not None
        self.memory.pages.drop(entry.pages)
        if entry.slot is not None:
            self.memory.slots.drop((entry.slot,))
        node.entry = None
        del self._kept[node]
        self._count(node, -1)
        self._prune(node)

    def _forget_above(self, node: Node) -> None:
        """Attention alone: a longer path serves whoever begins like a shorter one."""
        above = node.parent
        while above is not None:
            if above.entry:
                self._forget(above)
            above = above.parent

    def _prune(self, node: Node) -> None:
        """Forget tokens that lead to nothing."""
        while node.parent and not node.children and node.entry is None and node not in self._known:
            del node.parent.children[node.tokens[0]]
            self.tokens -= len(node.tokens)
            node = node.parent

    def _count(self, node: Node | None, change: int) -> None:
        while node is not None:
            node.entries += change
            node = node.parent


def _split(node: Node, at: int) -> Node:
    """Cut the edge of `node` behind its first `at` tokens → the new node there; `node` stays the lower one."""
    parent = node.parent
    assert parent is not None
    marks = (parent.depth + at) // BLOCK - parent.depth // BLOCK
    upper = Node(parent, node.tokens[:at], node.marks[:marks])
    upper.entries = node.entries
    parent.children[node.tokens[0]] = upper
    upper.children[node.tokens[at]] = node
    node.parent, node.tokens, node.marks = upper, node.tokens[at:], node.marks[marks:]
    return upper
