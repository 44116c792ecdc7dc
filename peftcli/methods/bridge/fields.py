"""peft's configuration: which tuners the installed peft has, which fields each takes, and which
values may stand there. All that is wrong is told in one message, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peftcli.errors import ConfigError, did_you_mean
from peftcli.imports import optional
from peftcli.words import in_words

INNER = "default"  # the adapter's name inside of peft
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
# What is decided here, or means nothing in a run.
OURS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
    " modules_to_save layer_replication runtime_config".split()
)
ELSEWHERE = {
    "modules_to_save": "method.modules_to_save trains modules whole",
    "layer_replication": "it copies blocks of the base",
    "trainable_token_indices": "take method.peft_type=TRAINABLE_TOKENS",
    "target_parameters": "it parametrises weights in place",
    "alora_invocation_tokens": "where they stand in a row is told to wrappers from outside of them",
    "arrow_config": "it routes between LoRA adapters that must be trained before",
    "kasa_config": "it rewrites the base, and its losses are added outside of its wrappers",
    "monteclora_config": "its loss is added outside of its wrappers",
    "velora_config": "what it sets by the first batch would be set anew after a restart",
    "use_asa": "the averages that it allocates by would not survive a restart",
}
# Why a tuner cannot train in a run of ours.
REFUSED = {
    "CPT": "its loss needs the type of every token of the prompt",
    "MULTITASK_PROMPT_TUNING": "every example would need the number of its task",
    "POLY": "every example would need the number of its task",
    "SHADOW": "it runs a second network beside the model, through hooks on the whole of it",
    "XLORA": "it routes between LoRA adapters that must be trained before",
}


# -- the installed peft ----------------------------------------------------------------------------
def installed_peft() -> Any:
    """The package `peft`, or what to install."""
    try:
        return optional("peft")
    except ImportError:
        raise ConfigError(
            "method=hf_peft needs Hugging Face peft: pip install 'peftcli[peft]'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's advice, which is about its own command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _config_class(peft_type: str) -> Any:
    installed_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tuners: dict[str, Any] = {t.value: cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in tuners:
        near = did_you_mean(peft_type.upper(), tuners)
        raise ConfigError(
            f"method.peft_type={peft_type}: the installed peft has no such tuner.{near} It has "
            f"{', '.join(sorted(tuners))}."
        )
    return tuners[peft_type]


def fields_of(peft_type: str) -> dict[str, Any]:
    """The tuner's fields and their types."""
    cls = _config_class(peft_type)
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def make_config(peft_type: str, fields: Mapping[str, Any]) -> Any:
    """peft's own configuration object, to train with unless `fields` say otherwise."""
    cls = _config_class(peft_type)
    try:
        with quiet():
            return cls(**{"inference_mode": False, **fields})
    except (ValueError, TypeError, ImportError) as e:
        raise ConfigError(f"method.config: peft's {cls.__name__} refuses it: {e}") from None


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


# -- what the user wrote ---------------------------------------------------------------------------
def check(peft_type: str, config: Mapping[str, Any], targets: Any) -> None:
    """The one message about what peft does not have, or what cannot be had here."""
    fields = fields_of(peft_type)
    if peft_type in REFUSED:
        raise ConfigError(f"method.peft_type={peft_type} cannot train here: {REFUSED[peft_type]}.")
    wrong = [_wrong(peft_type, key, value, fields) for key, value in config.items()]
    if targets is not None and "target_modules" in config:
        wrong.append("method.target_modules and method.config.target_modules: give one of them.")
    if targets is not None and "target_modules" not in fields:
        wrong.append(f"method.target_modules: peft's {peft_type} has none; leave it null.")
    if peft_type in PROMPTS and config.get("num_virtual_tokens") is None:
        wrong.append("method.config.num_virtual_tokens has no value; give one, such as 20.")
    if told := [text for text in wrong if text]:
        raise ConfigError("\n".join(told))


def _wrong(peft_type: str, key: str, value: Any, fields: Mapping[str, Any]) -> str | None:
    """What is wrong with one entry of `method.config`, or None."""
    if key in ELSEWHERE and key in fields and value not in (None, False, []):
        return f"method.config.{key} cannot be used here: {ELSEWHERE[key]}."
    if key == "inference_mode":
        return None
    known = [name for name in fields if name not in OURS]
    if key not in known:
        near = did_you_mean(key, known) or f" It has {', '.join(known)}."
        return f"method.config.{key}: peft's {peft_type} has no such field.{near}"
    if key == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal"):
        return (
            f"method.config.{key}={value} changes the base's own weights or looks at data; take "
            "true, false, gaussian or orthogonal, or method=lora with its method.init."
        )
    if not _fits(value, fields[key]):
        return f"method.config.{key}={value!r}: takes {_in_words(fields[key])}."
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of YAML may stand for the type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in args)
    if origin in (list, set, tuple, frozenset):
        return isinstance(value, list | tuple | set)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float)
    if hint is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not isinstance(hint, type):
        return True
    if dataclasses.is_dataclass(hint) or hint in (list, set, tuple):
        return isinstance(value, Mapping | list | tuple | set | hint)
    return isinstance(value, hint) or (issubclass(hint, str) and isinstance(value, str))


def _in_words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_in_words, args)))
    if origin in (list, set):
        return f"a list of {_in_words(args[0])}"
    return in_words(hint)
