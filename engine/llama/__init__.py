"""llama.cpp through llama-cpp-python: the only package here that calls the native library."""

import os

# Threads of a step that wait for each other spin by default for milliseconds. If anything else wants the cores, the
# event loop or another process, a step then takes up to 50 times as long, with stalls of seconds; spinning for
# microseconds costs nothing measurable on a quiet machine. libgomp reads this when it is loaded: before the import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from engine.llama.model import open_gguf, open_vocabulary

__all__ = ["open_gguf", "open_vocabulary"]
