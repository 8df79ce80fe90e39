"""OpenAI's generation endpoints: chat, text and responses, and vLLM's render endpoints for the first two."""
