"""Generation independent of an endpoint's shapes: the loaded model, output constraints, prepared chats and choices."""
