"""`suffix`: drafts the most frequent continuation of the longest suffix of the history that occurred before.

The suffix may have occurred in the request's own history or in recent outputs of other requests. A longer match gives a
longer draft (SuffixDecoding: Oliaro, Jia, Campos, Qiao 2024, arXiv 2411.04975).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul

from engine.speculate.proposer import NO_DRAFT, Draft
from engine.speculate.suffix_tree import Continuation, Locus, SuffixTree, TreeText


class SharedOutputs:
    """Recent outputs of all requests, at most `max_tokens` tokens in all. Belongs to the engine thread.

    Each salt has up to two trees. Once the newer tree has `max_tokens / 2` tokens, it becomes the older tree, the
    previous older tree is dropped, and running outputs continue in a new tree. So at least the last `max_tokens / 2`
    tokens of a single salt stay. Once all salts together have more than `max_tokens` tokens, the least recently used
    salt is dropped. With `max_tokens` below 2 no output is stored, because half of it is no token.
    """

    def __init__(self, max_tokens: int = 100_000, depth: int = 64) -> None:
        """`depth` is the maximum tokens of a suffix in the trees; a match is shorter."""
        self.size = 0
        """Number of tokens in all trees."""
        self._max_tokens = max_tokens
        self._depth = depth
        self._trees: OrderedDict[str, list[SuffixTree]] = OrderedDict()

    def trees(self, salt: str) -> Sequence[SuffixTree]:
        """Returns the trees of `salt`, at most two, newer tree first."""
        if salt not in self._trees:
            return ()
        self._trees.move_to_end(salt)
        return self._trees[salt]

    def extend(self, salt: str, output: OutputCursor, tokens: Iterable[int]) -> None:
        """Appends `tokens` to `output`, which belongs to one salt."""
        if self._max_tokens < 2:
            return
        for token in tokens:
            tree = self._writable(salt)
            if tree is not output.tree:
                output.tree, output.text = tree, TreeText()
            tree.extend(output.text, (token,))
            self.size += 1
            while self.size > self._max_tokens:
                self._drop(self._trees.popitem(last=False)[1])

    def _writable(self, salt: str) -> SuffixTree:
        """Returns the newer tree of `salt`; a new tree if that one is full."""
        trees = self._trees.setdefault(salt, [])
        self._trees.move_to_end(salt)
        if not trees or trees[0].size >= self._max_tokens // 2:
            trees.insert(0, SuffixTree(self._depth))
            self._drop(trees[2:])
            del trees[2:]
        return trees[0]

    def _drop(self, trees: Sequence[SuffixTree]) -> None:
        self.size -= sum(tree.size for tree in trees)


class OutputCursor:
    """Where one request's output is appended: a tree of `SharedOutputs`, and the output's text in that tree."""

    __slots__ = ("text", "tree")

    def __init__(self) -> None:
        self.tree: SuffixTree | None = None
        self.text = TreeText()


class SuffixProposer:
    """Drafts from suffix trees over the request's own history and over the shared outputs.

    Each tree gives the most frequent continuation of the longest match. The continuation has at most `factor` tokens
    per matched token, but at least one, and ends once the product of the chances is below `p_min`. The draft is the
    continuation with the most tokens expected to be accepted; of equal ones, that from the request's own history.

    Tokens after the first `prompt_length` are output. After `truncate` or `shift` the output continues as a new text
    among the shared outputs, so the shared outputs contain only token sequences that were emitted. `truncate` and
    `shift` reduce `prompt_length` by the number of prompt tokens that they remove.
    """

    def __init__(
        self,
        shared: SharedOutputs,
        salt: str,
        prompt_length: int,
        *,
        depth: int = 64,
        factor: float = 1.0,
        p_min: float = 0.1,
    ) -> None:
        self._shared = shared
        self._salt = salt
        self._prompt_length = prompt_length
        self._depth = depth
        self._factor = factor
        self._p_min = p_min
        self._output = OutputCursor()
        # For the newer and the older shared tree the length of the last match plus the number of tokens emitted since.
        # The search for the next match begins there. After a new tree is added the hints are those of other trees: a
        # wrong hint costs time only.
        self._length_hints = [1, 1]
        self._rebuild([])

    def begin(self, tokens: Sequence[int]) -> None:
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        # The continuations are compared by raw chances. The draft states discounted ones, so that the acceptance
        # statistics, which are kept by stated chance, separate short matches from long ones.
        best, best_expected = NO_DRAFT, 0.0
        for tree, match in self._matches():
            max_tokens = min(limit, max(1, int(self._factor * match.length)))
            if match.length and best_expected < max_tokens:  # else even a certain continuation is no better
                found = tree.continuation(match, max_tokens, self._p_min, self._text)
                expected = _expected_accepted(found)
                if expected > best_expected:
                    best, best_expected = Draft(found.tokens, _discounted(found, match.length)), expected
            if best_expected >= limit:
                break
        return best

    def _matches(self) -> Iterator[tuple[SuffixTree, Locus]]:
        """Yields the longest match of the history's end in its own tree, then in the shared trees, newer tree first."""
        trees = self._shared.trees(self._salt)
        yield self._tree, self._tree.active(self._text)
        for i, tree in enumerate(trees):
            match = tree.longest(self._text.tokens, self._length_hints[i])
            self._length_hints[i] = match.length
            yield tree, match

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history and to the shared outputs. `drafted` and `accepted` are not used."""
        output_start = max(0, self._prompt_length - len(self._text.tokens))
        self._tree.extend(self._text, emitted)
        self._shared.extend(self._salt, self._output, emitted[output_start:])
        self._length_hints = [hint + len(emitted) for hint in self._length_hints]

    def truncate(self, length: int) -> None:
        self.shift(length, len(self._text.tokens) - length)

    def shift(self, keep: int, discard: int) -> None:
        if discard <= 0:
            return
        tokens, end = self._text.tokens, keep + discard
        self._prompt_length -= max(0, min(end, self._prompt_length) - keep)
        self._output = OutputCursor()
        self._rebuild(tokens[:keep] + tokens[end:])

    def end(self) -> None:
        """Frees the history; the output stays among the shared outputs."""
        self._rebuild([])

    def _rebuild(self, history: Sequence[int]) -> None:
        self._tree, self._text = SuffixTree(self._depth), TreeText()
        self._tree.extend(self._text, history)


def _discounted(continuation: Continuation, matched: int) -> list[float]:
    """Returns the chances, each times 1 - 1/n, where n is the number of tokens matched and drafted up to the token: a
    short match is weak evidence."""
    return [chance * (1 - 1 / length) for length, chance in enumerate(continuation.chances, matched + 1)]


def _expected_accepted(continuation: Continuation) -> float:
    """Returns the expected number of accepted tokens of a draft of `continuation`."""
    products: Iterable[float] = accumulate(continuation.chances, mul)
    return sum(products)
