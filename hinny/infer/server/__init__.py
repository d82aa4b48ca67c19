"""A run behind an OpenAI-compatible address: HTTP in front, one thread that owns the engine behind."""
