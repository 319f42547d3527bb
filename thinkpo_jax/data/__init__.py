"""Turns rows of data sets into tokenized, packed batches.

A stage lists its data as `SftDataConfig` or `PreferenceDataConfig`. `tokenize_sources` reads it and encodes it with a
`ChatTokenizer`, which gives a `TokenizedDataset`. `split_held_out` selects the validation examples. `BatchPlan` packs
examples into batches. Benchmarks and pair building read records without tokenizing them: `iterate_valid_records` and
`iterate_responses`.
"""
