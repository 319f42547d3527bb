"""The decoder, its attention kernels, and Hugging Face weights in and out.

`resolve_model_source` opens a model folder, and `ModelSource.load` returns a `Transformer` on the mesh. `save_model`
writes a Hugging Face folder. weight_mapping.py holds the one table of parameter names for both directions.
"""
