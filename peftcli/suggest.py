"""From a key that does not exist to the one meant: spelling, group, or another tool's word."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# What other tools call our keys: transformers, peft, trl, axolotl, LLaMA-Factory, litgpt ...
_OTHERS = """
run_dir: output_dir out_dir save_dir
name: run_name experiment_name wandb_name
seed: random_state random_seed
resume: resume_from_checkpoint auto_resume auto_resume_from_checkpoints
model: model_type
model.name_or_path: model_name_or_path base_model model_name model_path
model.name_or_path: pretrained_model_name_or_path model_id
model.revision: model_revision revision_of_model
model.tokenizer: tokenizer_name tokenizer_name_or_path tokenizer_path
model.chat_template: template
model.dtype: torch_dtype bnb_4bit_compute_dtype
model.attn_implementation: attn flash_attention flash_attn use_flash_attention_2 attn_impl
method: adapter peft_type finetuning_type use_dora peft
method.r: lora_r lora_rank rank
method.alpha: lora_alpha
method.dropout: lora_dropout
method.target_modules: lora_target lora_target_modules lora_target_linear
method.init: init_lora_weights pissa_init
method.lr_ratio: loraplus_lr_ratio
method.embedding_lr: loraplus_lr_embedding loraplus_embedding_lr
method.use_rslora: rslora peft_use_rslora
method.modules_to_save: lora_modules_to_save additional_target
optimizer: optim
optimizer.lr: learning_rate
optimizer.weight_decay: wd
optimizer.betas: adam_beta1 adam_beta2 beta1 beta2
optimizer.eps: adam_epsilon
scheduler: lr_scheduler lr_scheduler_type
scheduler.kwargs: lr_scheduler_kwargs
scheduler.warmup_steps: num_warmup_steps lr_warmup_steps
scheduler.warmup_ratio: warmup
quantization: load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant
quantization: bnb_4bit_quant_storage quantization_bit quantize
strategy: deepspeed fsdp fsdp_config distributed_type accelerator
strategy.config: deepspeed_config ds_config deepspeed_config_file
strategy.zero_stage: zero stage zero_optimization
strategy.offload: cpu_offload offload_params offload_optimizer offload_param
launch.num_processes: num_gpus devices nproc_per_node num_procs gpus world_size
launch.nnodes: num_nodes num_machines
launch.node_rank: machine_rank
launch.rdzv_endpoint: master_addr master_port main_process_ip main_process_port
launch.timeout: ddp_timeout
launch.max_restarts: max_restarts restarts
logger: report_to
logger.project: wandb_project project_name
logger.mode: wandb_mode
trainer.max_steps: max_train_steps total_steps num_steps steps max_iters
trainer.num_train_epochs: epochs num_epochs max_epochs train_epochs
trainer.per_device_train_batch_size: micro_batch_size batch_size train_batch_size
trainer.per_device_train_batch_size: per_device_batch_size
trainer.per_device_eval_batch_size: eval_batch_size val_batch_size
trainer.gradient_accumulation_steps: gradient_accumulation grad_accum accumulation_steps
trainer.gradient_accumulation_steps: gradient_accumulation_iters accumulate_grad_batches
trainer.max_grad_norm: gradient_clipping clip_grad_norm grad_clip max_norm gradient_clip_val
trainer.bf16: fp16 mixed_precision precision amp
trainer.gradient_checkpointing: use_gradient_checkpointing activation_checkpointing
trainer.eval_steps: eval_every eval_interval evals_per_epoch val_check_interval
trainer.save_steps: save_every save_interval saves_per_epoch
trainer.save_total_limit: keep_checkpoints max_checkpoints
trainer.logging_steps: log_steps log_interval log_every_n_steps
trainer.stop_after: max_time time_limit max_hours max_seconds
trainer.metric_for_best: metric_for_best_model
dataset.path: data data_path dataset_name dataset_path train_file datasets data_files
dataset.format: dataset_type data_format
dataset.eval_path: validation_file eval_file eval_dataset val_path test_datasets
dataset.eval_fraction: val_set_size val_size test_size validation_split_percentage
dataset.max_length: cutoff_len sequence_len max_seq_length max_seq_len seq_len model_max_length
dataset.max_length: block_size sequence_length
dataset.train_samples: max_samples max_train_samples
dataset.eval_samples: max_eval_samples
dataset.packing: sample_packing
dataset.train_on: train_on_inputs train_on_prompt mask_inputs assistant_only_loss
dataset.train_on: completion_only_loss
dataset.num_proc: preprocessing_num_workers dataset_num_proc dataset_processes
dataset.system: system_prompt default_system
dataset.seed: data_seed
"""
ALIASES = {
    alias: line.split(": ")[0]
    for line in _OTHERS.strip().splitlines()
    for alias in line.split(": ")[1].split()
}


def nearest_keys(given: str, keys: Collection[str], count: int = 3) -> list[str]:
    """The keys that `given` most likely means, best first; one alone where there is little doubt.

    `keys` may hold group names too.
    """
    group, _, last = given.rpartition(".")
    inside = [key for key in keys if key.rpartition(".")[0] == group]
    alias = ALIASES.get(last, "")
    same_name = [key for key in keys if _last(key) == last]
    slips = [key for key in inside if _one_edit(_last(key), last)]
    for certain in ([alias] if alias in keys else [], same_name, slips):
        if len(certain) == 1:
            return certain
    candidates = [key for key in keys if "." in key or "." not in given]
    near = [
        *_close(given, same_name, 0.0),
        *slips,
        *(
            key
            for name in _close(last, map(_last, inside), 0.6)
            for key in inside
            if _last(key) == name
        ),
        *_close(given, candidates, 0.75),
        *(
            key
            for name in _close(last, map(_last, candidates), 0.75)
            for key in candidates
            if _last(key) == name
        ),
        *(ALIASES[name] for name in _close(last, ALIASES, 0.85) if ALIASES[name] in keys),
    ]
    return list(dict.fromkeys(near))[:count]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _close(given: str, among: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(given, list(dict.fromkeys(among)), n=3, cutoff=cutoff)


def _one_edit(a: str, b: str) -> bool:
    """Whether a letter changed, added, dropped or swapped with its neighbour makes `a` into `b`."""
    if abs(len(a) - len(b)) > 1 or max(len(a), len(b)) < 2:
        return False
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[i:], b[i:]
    swapped = rest_a[:2] == rest_b[1::-1] and len(rest_a) > 1 and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:]
