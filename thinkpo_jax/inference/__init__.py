"""Generates completions from prompts, with the local model or a server."""
