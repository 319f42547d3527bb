"""Generates completions from prompts, with the local model or a server.

Both ways take a `SamplingConfig` (in `sampling`) and give a `Completion` (in `engine`) for each prompt. The local model
runs in `engine.generate`. A server with OpenAI's chat API is described by `openai_engine.ServerConfig` and used by
`openai_engine.request_completions`.
"""
