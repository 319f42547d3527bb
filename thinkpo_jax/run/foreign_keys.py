"""Keys of TRL, transformers and similar programs, and old keys, and what to write here instead."""

_NO_LORA = "There is no LoRA here, because every weight is trained. Leave it out"
_NO_SERVICE = "Nothing is sent to a service. Metrics are in metrics.jsonl of the stage. Leave it out"
_NO_HUB = "Models are not uploaded. Upload the folder that `python -m thinkpo_jax.export` writes. Leave it out"
_MESH = "Use `mesh`, whose axis `fsdp` shards weights and optimizer over the devices"
_BATCH = "Use `stages.NAME.batch.size`, the examples of an update over all devices"
_MICRO = (
    "Use `stages.NAME.batch.size` for the examples of an update over all devices, and "
    "`stages.NAME.batch.rows_per_device` to compute them in micro-batches"
)
_ROW = "Use `stages.NAME.batch.row_length`, the tokens of a packed row. No example can be longer"
_STEPS = "Use `stages.NAME.steps`, the updates of the stage"
_EPOCHS = "Use `stages.NAME.epochs`"
_RATE = "Use `stages.NAME.optimizer.learning_rate`"
_SCHEDULE = "Use `stages.NAME.optimizer.schedule`"
_DTYPE = "Use `compute.dtype`. Weights stay float32, and the network is computed in bfloat16 by default"
_REMAT = "Use `compute.remat`"
_DATA = "Use `stages.NAME.data.path`, a file, a folder or a Hub id"
_MODEL = "Use `model.path`, a Hugging Face folder or a Hub id"
_RUN_DIR = "Use `run_dir`, the folder of the run"
_SAVE = "Use `stages.NAME.checkpoint.every`, the updates between checkpoints"
_VALIDATION = (
    "Use `stages.NAME.validation`, which holds out a `share` of the examples and evaluates `every` so many updates"
)
_PACK = "Use `stages.NAME.batch.pack`. Examples are packed by default"
_OPTIMIZER = "The optimizer is AdamW, with the keys of `stages.NAME.optimizer`. Leave it out"
_WORKERS = "Data is tokenized once and cached. Leave it out"
_ALWAYS_LOGGED = "Every update is logged in metrics.jsonl of the stage. Leave it out"
_REFERENCE = "The reference is the model that the stage starts from: `stages.NAME.init_from`. Its log-probs are cached"
_NO_CODE = "Code of a model or data set is never run. Leave it out"
_ALWAYS_RESUMED = "A run resumes by itself when the same command runs again. Leave it out"
_ATTENTION = "Use `compute.attention`. The default picks the kernel of the device"
_VALIDATION_BATCH = "Validation uses the rows of the training batch. Leave it out"
_ANSWERS = "Only answers are trained. `stages.NAME.data.train_on` chooses the last one or all of a conversation"

# A sentence in which NAME stands for the name of a stage. A dotted path is an old key.
FOREIGN_KEYS = {
    "evaluation.sampling.batch_size": "Use `evaluation.local.slots`, the answers that are generated at the same time",
    "adam_beta1": "Use `stages.NAME.optimizer.b1`",
    "adam_beta2": "Use `stages.NAME.optimizer.b2`",
    "adam_epsilon": "Use `stages.NAME.optimizer.eps`",
    "adapter": _NO_LORA,
    "assistant_only_loss": _ANSWERS,
    "attn_implementation": _ATTENTION,
    "base_model": _MODEL,
    "batch_size": _BATCH,
    "bf16": _DTYPE,
    "completion_only_loss": _ANSWERS,
    "cutoff_len": _ROW,
    "data_seed": "Use `seed`",
    "dataloader_num_workers": _WORKERS,
    "dataset": _DATA,
    "dataset_config": "Use `stages.NAME.data.subset`",
    "dataset_name": _DATA,
    "dataset_num_proc": _WORKERS,
    "dataset_path": _DATA,
    "dataset_split": "Use `stages.NAME.data.split`",
    "dataset_text_field": "Use `stages.NAME.data.response`, the column with the answer",
    "datasets": _DATA,
    "deepspeed": _MESH,
    "do_eval": _VALIDATION,
    "eval_batch_size": _VALIDATION_BATCH,
    "eval_steps": _VALIDATION,
    "eval_strategy": _VALIDATION,
    "evaluation_strategy": _VALIDATION,
    "finetuning_type": _NO_LORA,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "fp16": _DTYPE,
    "fsdp_config": _MESH,
    "gradient_accumulation_steps": _MICRO,
    "gradient_checkpointing": _REMAT,
    "gradient_checkpointing_kwargs": _REMAT,
    "group_by_length": _PACK,
    "hub_model_id": _NO_HUB,
    "load_in_4bit": _NO_LORA,
    "load_in_8bit": _NO_LORA,
    "logging_dir": _ALWAYS_LOGGED,
    "logging_steps": _ALWAYS_LOGGED,
    "logging_strategy": _ALWAYS_LOGGED,
    "lora_alpha": _NO_LORA,
    "lora_dropout": _NO_LORA,
    "lora_r": _NO_LORA,
    "lora_rank": _NO_LORA,
    "lora_target": _NO_LORA,
    "lora_target_modules": _NO_LORA,
    "loss_type": "Use `stages.NAME.loss`",
    "lr": _RATE,
    "lr_scheduler": _SCHEDULE,
    "lr_scheduler_type": _SCHEDULE,
    "max_completion_length": _ROW,
    "max_length": _ROW,
    "max_new_tokens": "Use `evaluation.sampling.max_new_tokens`",
    "max_prompt_length": _ROW,
    "max_seq_length": _ROW,
    "max_steps": _STEPS,
    "micro_batch_size": _MICRO,
    "model_name": _MODEL,
    "model_name_or_path": _MODEL,
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "optim": _OPTIMIZER,
    "output_dir": _RUN_DIR,
    "overwrite_output_dir": "A run never overwrites another one. Choose another `run_dir`",
    "packing": _PACK,
    "padding_free": _PACK,
    "peft_config": _NO_LORA,
    "per_device_eval_batch_size": _VALIDATION_BATCH,
    "per_device_train_batch_size": _MICRO,
    "precompute_ref_log_probs": _REFERENCE,
    "pref_beta": "Use `stages.NAME.beta`",
    "pref_loss": "Use `stages.NAME.loss`",
    "preprocessing_num_workers": _WORKERS,
    "push_to_hub": _NO_HUB,
    "ref_model": _REFERENCE,
    "report_to": _NO_SERVICE,
    "resume_from_checkpoint": _ALWAYS_RESUMED,
    "rpo_alpha": "Use `stages.NAME.nll_weight`",
    "run_name": "Use `title`, the title of the report",
    "sample_packing": _PACK,
    "save_steps": _SAVE,
    "save_strategy": _SAVE,
    "save_total_limit": "Use `stages.NAME.checkpoint.keep`",
    "sequence_len": _ROW,
    "template": "The chat template is that of `model.path`. Leave it out",
    "tf32": _DTYPE,
    "tokenizer_name_or_path": "The tokenizer is that of `model.path`. Leave it out",
    "torch_dtype": _DTYPE,
    "train_batch_size": _BATCH,
    "train_on_inputs": _ANSWERS,
    "trust_remote_code": _NO_CODE,
    "use_peft": _NO_LORA,
    "val_set_size": _VALIDATION,
    "wandb_project": _NO_SERVICE,
    "warmup_steps": "Use `stages.NAME.optimizer.warmup_ratio`, a fraction of the updates of the stage",
}
