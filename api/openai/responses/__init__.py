"""OpenAI's Responses API: input items to a chat, output items and events from its parsed text, stored responses."""
