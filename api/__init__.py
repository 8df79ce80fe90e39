"""The HTTP server: OpenAI-compatible endpoints over `engine`. The package does not import llama-cpp-python."""
