"""OpenAI's generation endpoints, chat and text, and vLLM's render endpoints for both."""
