"""Chat templates: built-in and the model's own, tool messages for templates without tools, and prompt tokenization."""
