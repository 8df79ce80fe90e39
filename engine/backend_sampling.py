"""The protocol of backend sampling: the device that computes the logits selects the most likely tokens of each row.

Only their ids and logits are then copied to the host, where `engine.sampling` picks from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class SelectedTokens(NamedTuple):
    """The most likely tokens of rows, in any order. All other tokens have at most the lowest selected logit."""

    ids: NDArray[np.int32]
    """[rows, count]"""
    logits: NDArray[np.float32]
    """[rows, count]"""


class BackendSampling(Protocol):
    """The selection of tokens in the decodes of a context. Only the engine thread may call the methods."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The possible numbers of selected tokens of a row, ascending."""

    @property
    def current(self) -> Mapping[int, int]:
        """The current count by sequence id. Rows of ids without a count have all logits."""

    def change(self, counts: Mapping[int, int]) -> None:
        """Sets the count of each sequence id in `counts`, 0 for none, for later decodes. The next decode takes longer,
        as the library builds its graphs again. Raises NativeFault."""

    def selected(self, rows: int) -> SelectedTokens:
        """Returns the selected tokens of the first `rows` rows of logits of the last decode, valid until the next one.

        The arrays have as many columns as the highest current count. In each row only the first columns are defined, up
        to the count of its sequence. The logits that `decode` returns for such a row are undefined.
        """
