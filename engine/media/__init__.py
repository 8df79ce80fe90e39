"""Images and sounds in prompts: runs of pseudo-tokens, whose embeddings are computed on a thread of their own.

- `values.py`: runs, pseudo-tokens, and the protocol of a projector
- `file_check.py`, `sound_check.py`: the checks of files before they are decoded
- `reader.py`: a text with markers and its files, as a prompt
- `encoder.py`: the encoding thread and the cache of embeddings
"""

from engine.media.encoder import MediaEncoder, WantedRun
from engine.media.file_check import MAX_FILE_BYTES
from engine.media.reader import MediaPrompt, MediaReader
from engine.media.values import (
    Embeddings,
    MediaChunk,
    MediaPiece,
    MediaRun,
    Projector,
    UnreadableMedia,
    content_key,
    pseudo_tokens,
    without_runs,
)

__all__ = [
    "MAX_FILE_BYTES",
    "Embeddings",
    "MediaChunk",
    "MediaEncoder",
    "MediaPiece",
    "MediaPrompt",
    "MediaReader",
    "MediaRun",
    "Projector",
    "UnreadableMedia",
    "WantedRun",
    "content_key",
    "pseudo_tokens",
    "without_runs",
]
