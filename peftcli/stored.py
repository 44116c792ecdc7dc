"""In how many bits a run's base is stored, known before its weights are loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from peftcli.dist import strategies
from peftcli.errors import ConfigError
from peftcli.models import load, quantise
from peftcli.models.source import cache_dir, resolve
from peftcli.settings import Run


def bits_of(run: Run, config: PreTrainedConfig | None = None) -> str:
    """How linears of the base are quantised: `none`, by `run.quantization`, or as the model's files
    hold them. Raises `ConfigError` where these cannot be read, or not so.
    """
    asked = run.quantization.name
    config = config or load.load_config(resolve(run.model, cache_dir()), run.model)
    quantise.refuse_stored(run.model.name_or_path, config, asked)
    return quantise.stored_as(config) or asked


def refuse(run: Run, bits: str) -> None:
    """Raises `ConfigError` where the run's method or strategy cannot do with quantised weights."""
    if bits == "none":
        return
    strategies.refuse_bits(run, bits)
    if not run.method.on_quantised:
        in_files = bits != run.quantization.name
        what = (
            f"{run.model.name_or_path} is stored in {bits}" if in_files else f"quantization={bits}"
        )
        raise ConfigError(
            f"{what}: {type(run.method).__name__} changes the base's own weights, which cannot "
            "train in few bits. Use quantization=none and a model that is stored plain; "
            "`peft-train methods --quantisable` lists the methods that can."
        )
