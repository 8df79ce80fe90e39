"""llama.cpp through llama-cpp-python: the only package here that calls the native library."""

import os

# By default the threads of a step spin for milliseconds at each barrier. If the event loop or another process needs the
# cores, a step then takes up to 50 times as long, with stalls of seconds. Spinning for microseconds costs nothing
# measurable on a quiet machine. libgomp uses the variable when it is loaded, so it is set before the import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from engine.llama.model import open_gguf, open_vocabulary

__all__ = ["open_gguf", "open_vocabulary"]
