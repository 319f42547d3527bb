"""Compiles the programs of a run for devices that are not attached, and reports memory, traffic and FLOPs.

`python -m thinkpo_jax.plan` calls `plan_stage.plan_stages`, `search.search_layouts` and `search.find_smallest_slice`.
`plan_evaluation` and `inference` plan the local engine.
`topology` (`parse_topology`, `list_slices`) names devices. `compile.compile_stage_program` compiles one program for
them. `hlo` reads what the compiler wrote. `estimates` does the arithmetic that needs no compiler.
"""
