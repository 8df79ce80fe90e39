"""`suffix`: the longest end of the history that was seen before, and what mostly followed it then.

It was seen in the request's own history, or in what other requests said lately. The longer the match, the longer the
draft (SuffixDecoding: Oliaro, Jia, Campos, Qiao 2024, arXiv 2411.04975).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul

from engine.speculate.base import NO_DRAFT, Draft
from engine.speculate.tree import Continuation, Locus, SuffixTree, Text


class SharedOutputs:
    """What requests said lately, at most `tokens` tokens of it. Engine thread only.

    Each salt has outputs of its own, in up to two trees. When the newer holds half of `tokens`, it becomes the older
    one, the older one is dropped, and outputs being written go on in a fresh tree: so at least the last half is
    there. When all salts together hold more than `tokens`, the one that was not used for longest is dropped. With
    `tokens` below 2 nothing is kept.
    """

    def __init__(self, tokens: int = 100_000, depth: int = 64) -> None:
        self.size = 0
        """Tokens in all trees."""
        self._tokens = tokens
        self._depth = depth
        self._trees: OrderedDict[str, list[SuffixTree]] = OrderedDict()

    def trees(self, salt: str) -> Sequence[SuffixTree]:
        """What requests of `salt` said, newer tree first; at most two."""
        if salt not in self._trees:
            return ()
        self._trees.move_to_end(salt)
        return self._trees[salt]

    def extend(self, salt: str, output: Output, tokens: Iterable[int]) -> None:
        """`tokens` follow in `output`, which is always of the same salt."""
        if self._tokens < 2:
            return
        for token in tokens:
            tree = self._open(salt)
            if tree is not output.tree:
                output.tree, output.text = tree, Text()
            tree.extend(output.text, (token,))
            self.size += 1
            while self.size > self._tokens:
                self._drop(self._trees.popitem(last=False)[1])

    def _open(self, salt: str) -> SuffixTree:
        """The newer tree of `salt`, with room for a token."""
        trees = self._trees.setdefault(salt, [])
        self._trees.move_to_end(salt)
        if not trees or trees[0].size >= self._tokens // 2:
            trees.insert(0, SuffixTree(self._depth))
            self._drop(trees[2:])
            del trees[2:]
        return trees[0]

    def _drop(self, trees: Sequence[SuffixTree]) -> None:
        self.size -= sum(tree.size for tree in trees)


class Output:
    """What one request says, as it is written into a tree of `SharedOutputs`."""

    __slots__ = ("text", "tree")

    def __init__(self) -> None:
        self.tree: SuffixTree | None = None
        self.text = Text()


class Suffix:
    """The `suffix` proposer of a request whose prompt has `prompt_length` tokens; what follows them is its output.

    A tree over the whole history and those of the shared outputs each offer what mostly followed their longest match:
    at most `factor` tokens for each token of the match, but at least one, and as long as all together are at least
    `p_min` likely. The one wins of which most tokens may be expected to be right; the history's own before others'.

    After `truncate` or `shift` the output goes on as a new one among the shared outputs: what others learn from is
    what was truly said. Prompt tokens that are edited away make the prompt shorter.
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
        self._output = Output()
        self._guesses = [1, 1]  # how long the matches in the shared trees were, and would be if they went on
        self._relearn([])

    def begin(self, tokens: Sequence[int]) -> None:
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        best, expected = NO_DRAFT, 0.0
        for tree, match in self._matches():
            most = min(limit, max(1, int(self._factor * match.length)))
            if match.length and expected < most:
                found = tree.continuation(match, most, self._p_min, self._text)
                right = _expected(found)
                if right > expected:
                    best, expected = Draft(found.tokens, _wary(found, match.length)), right
            if expected >= limit:
                break
        return best

    def _matches(self) -> Iterator[tuple[SuffixTree, Locus]]:
        """Where the history's end was seen before: in the history, and in what was said lately, newer first."""
        trees = self._shared.trees(self._salt)
        yield self._tree, self._tree.active(self._text)
        for i, tree in enumerate(trees):
            match = tree.longest(self._text.tokens, self._guesses[i])
            self._guesses[i] = match.length
            yield tree, match

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        said = max(0, self._prompt_length - len(self._text.tokens))
        self._tree.extend(self._text, emitted)
        self._shared.extend(self._salt, self._output, emitted[said:])
        self._guesses = [guess + len(emitted) for guess in self._guesses]

    def truncate(self, length: int) -> None:
        self.shift(length, len(self._text.tokens) - length)

    def shift(self, keep: int, discard: int) -> None:
        if discard <= 0:
            return
        tokens, end = self._text.tokens, keep + discard
        self._prompt_length -= max(0, min(end, self._prompt_length) - keep)
        self._output = Output()
        self._relearn(tokens[:keep] + tokens[end:])

    def end(self) -> None:
        """The history is forgotten, the output stays among the shared ones."""
        self._relearn([])

    def _relearn(self, history: Sequence[int]) -> None:
        self._tree, self._text = SuffixTree(self._depth), Text()
        self._tree.extend(self._text, history)


def _wary(continuation: Continuation, matched: int) -> list[float]:
    """The tokens' chances where so many before them were matched: after one token even what always followed may not."""
    return [chance * (1 - 1 / length) for length, chance in enumerate(continuation.chances, matched + 1)]


def _expected(continuation: Continuation) -> float:
    """How many of the tokens may be expected to be right."""
    together: Iterable[float] = accumulate(continuation.chances, mul)
    return sum(together)
