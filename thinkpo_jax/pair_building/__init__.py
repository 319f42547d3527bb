"""Builds preference pairs from long and short answers.

The pipeline is `build_pairs.build_pairs`, and its configuration is `build_pairs.PairsConfig`. Its steps are in
`short_answers`, which collects the short answers, `filters`, which drops and selects pairs, and `data_card`, which
writes the pairs and describes them.
"""
