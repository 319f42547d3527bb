"""Loads benchmark questions, grades answers, compares models and writes the report of a run.

Other folders use the config sections in `evaluation_config` and the types in `results`. The table `BENCHMARKS` and
`load_questions` are in `benchmarks`, and the graders are in `grading`. The other names that they use are
`find_contamination` in `decontamination`, `compare_pooled_runs` in `statistics`, and `write_report` in `report`.
"""
