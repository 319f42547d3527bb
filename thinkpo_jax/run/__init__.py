"""A run as the user sees it: its configuration, its folder, and the steps that the commands share.

`load_run_config` reads the YAML file. `resolve_run` checks it and returns its parts. `RunFolder` holds its paths and
records. The commands also use `load_stage_inputs`, `begin_stage`, `save_stage_output`, `evaluate_run` and
`export_checkpoint`.
"""
