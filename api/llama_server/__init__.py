"""Endpoints in llama-server's own shapes: /completion, /tokenize, /detokenize, /apply-template, /slots and /props."""
