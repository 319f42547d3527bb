"""Loads benchmark questions, grades answers, compares models and writes the report of a run.

Other folders use the types in `results`, and `EvaluationConfig` and `evaluate_model` in `evaluate_model`. The table
`BENCHMARKS`, its config section and `load_questions` are in `benchmarks`, the sampling parameters in `protocols`, and
`find_contamination` in `decontamination`. The graders are in `grading`. They read answers with `answer_extraction` and
compare them with `answer_equality`. `analysis` computes what a report shows, with `statistics` and `measures`.
`write_report` is in `report`, and `Probe` in `probes`.
"""
