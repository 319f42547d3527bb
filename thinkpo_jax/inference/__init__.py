"""Generates completions from prompts, with the local model or a server.

Both are an `Engine`, which takes `Request`s and a `SamplingConfig` and gives a `Completion` for each request (all in
`engine`). `local_engine.LocalEngine` runs a model on this machine. `openai_engine.ServerEngine` asks a server with
OpenAI's chat API. `engine_config.EngineConfig` is the section that chooses one of them. `saved_answers.SavedAnswers`
saves completions as they arrive, so that an interrupted run resumes.
"""
