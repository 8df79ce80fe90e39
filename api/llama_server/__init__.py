"""Endpoints in llama-server's shapes: /completion, /tokenize, /detokenize, /apply-template, /slots, /lora-adapters,
/props and others."""
