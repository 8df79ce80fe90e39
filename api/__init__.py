"""The HTTP server: OpenAI-compatible endpoints over `engine`. Knows no llama.cpp."""
