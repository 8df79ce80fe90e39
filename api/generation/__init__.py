"""Generation, shared by all endpoints: the loaded model, output constraints, prepared chats and choices."""
