"""JSON bodies in the shapes of OpenAI's API, with the extensions of llama-server and vLLM: requests and replies."""
