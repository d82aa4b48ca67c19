"""Inference: the engine that turns a run into text, token by token or many at once."""
