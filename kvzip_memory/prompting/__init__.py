"""Text to ids and back: what users hand in, chat templates, tools, guided answers."""
