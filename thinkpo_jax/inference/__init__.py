"""Generates completions from prompts, with the local model or a server.

Both ways take a `SamplingConfig` and give a `Completion` (both in `engine`) for each prompt. `engine.generate` runs the
local model. `openai_engine.request_completions` asks a server with OpenAI's chat API, which a `ServerConfig` describes.
"""
