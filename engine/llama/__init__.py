"""llama.cpp through llama-cpp-python: the only package here that calls the native library."""

from engine.llama.model import open_gguf

__all__ = ["open_gguf"]
