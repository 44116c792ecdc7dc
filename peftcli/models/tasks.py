"""What a model is for: the task of a run, and the class of transformers that an architecture has
for it.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from peftcli.errors import ConfigError
from peftcli.settings import LABELLED, Format, Model, Task

_AUTO: dict[Task, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
_TASK_OF: dict[str, Task] = {
    "classification": "classification",
    "regression": "regression",
    "image_classification": "image_classification",
}


def infer_task(cfg: Model, config: PreTrainedConfig, format: Format) -> Task:
    """The task of `model.task`, else of the data's format, else of the architecture."""
    if cfg.task != "auto":
        return cfg.task
    if format in _TASK_OF:
        return _TASK_OF[format]
    if config.is_encoder_decoder:
        return "seq2seq"
    if format != "auto":  # chat, instruct, prompt_completion, text
        return "causal_lm"
    offered = offers(config)
    return offered[0] if offered else "causal_lm"


def offers(config: PreTrainedConfig) -> list[Task]:
    """The tasks that the architecture has a model for, the most natural first."""
    return [task for task in _AUTO if _found(task, config) is not None]


def for_task(
    config: PreTrainedConfig, task: Task, labels: tuple[str, ...] | None
) -> PreTrainedConfig:
    """A copy of `config` with the number and names of the task's outputs."""
    config = copy.deepcopy(config)
    if task == "regression":
        config.id2label, config.label2id = {0: "score"}, {"score": 0}
        config.problem_type = "regression"
    elif task in LABELLED and labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return config


def class_for(
    task: Task, config: PreTrainedConfig, cfg: Model | None = None, cloze: bool = False
) -> Any:
    """The class of transformers for the task; `cloze`: the encoder with its masked-language head.

    Raises ConfigError where there is none.
    """
    if cloze:
        return _cloze_class(task, config)
    if cfg is not None and cfg.trust_remote_code and hasattr(config, "auto_map"):
        return _AUTO[task]
    cls = _found(task, config)
    if cls is None:
        choices = offers(config)
        raise ConfigError(
            f"{config.model_type} has no model for the task {task}. "
            + (f"It offers model.task={' or '.join(choices)}." if choices else "It offers none.")
        )
    return cls


def _cloze_class(task: Task, config: PreTrainedConfig) -> Any:
    mapping = AutoModelForMaskedLM._model_mapping
    if task != "classification" or config.is_encoder_decoder or type(config) not in mapping:
        raise ConfigError(
            "method.label_words answer a classification by an encoder (BERT, RoBERTa ...); this "
            f"is {config.model_type} with model.task={task}."
        )
    return mapping[type(config)]


def _found(task: Task, config: PreTrainedConfig) -> Any:
    """The architecture's class for the task, or None. Encoders count as no language models."""
    if task == "causal_lm":
        alone = getattr(config, "is_decoder", False)
        is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not alone
        if config.is_encoder_decoder or is_encoder:
            return None
    mapping = _AUTO[task]._model_mapping
    found = mapping[type(config)] if type(config) in mapping else None
    return found[0] if isinstance(found, tuple) else found
