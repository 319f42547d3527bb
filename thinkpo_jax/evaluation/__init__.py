"""Loads benchmark questions, grades answers, compares models and writes the report of a run.

Other folders use the types in `results`, and `EvaluationConfig` and `evaluate_model` in `evaluate_model`. The table
`BENCHMARKS`, its config section, `load_questions` and `find_contamination` are in `benchmarks`. The graders are in
`grading`, `compare_pooled_runs` in `statistics`, and `write_report` in `report`.
"""
