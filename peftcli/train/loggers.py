"""Where metrics go besides metrics.jsonl: tensorboard or wandb, both without a network unless asked
for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from peftcli.errors import ConfigError, first_sentence
from peftcli.screen import say
from peftcli.settings import Logger, Run


class Sink(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values at the step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class Nothing:
    """No further logger."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Drop the values; metrics.jsonl has them."""

    def close(self) -> None:
        """Nothing to end."""


class TensorBoard:
    """Event files in `run_dir`/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logger=tensorboard needs the package: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Each value as a scalar."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


class Wandb:
    """A wandb run whose id comes from the run folder, so that a resumed run goes on in it. Where
    wandb's server is not reached, or does not let us in, the run is kept offline, to be sent later.
    """

    def __init__(
        self, settings: Logger, folder: Path, name: str, config: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logger=wandb needs the package: pip install wandb") from None
        options: dict[str, Any] = {
            "project": settings.project,
            "name": name,
            "id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "settings": wandb.Settings(console="off", silent=True, x_disable_stats=True),
        }
        try:
            self.run = wandb.init(mode=settings.mode, **options)
        except wandb.Error as e:
            if settings.mode == "offline":
                raise
            say(
                f"wandb: {first_sentence(e)} The run is kept offline; "
                f"`wandb sync {folder}/wandb/offline-run-*` sends it later.",
                "yellow",
            )
            self.run = wandb.init(mode="offline", **options)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All values of the step."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run's files."""
        self.run.finish()


def make_sink(run: Run, folder: Path, cfg: DictConfig, step: int) -> Sink:
    """The logger that the `logger` group names; `step` is where the run continues."""
    if run.logger.name == "tensorboard":
        return TensorBoard(folder, step)
    if run.logger.name == "wandb":
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        return Wandb(run.logger, folder, run.name, config)
    return Nothing()
