"""Writes the files of this folder anew, which is due when the format of checkpoints changes:

    python -m tests.train.golden.write

What older versions wrote stays beside it, each in a folder of its format, and is read on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.export import adapter
from peftcli.methods.lora import LoRA
from peftcli.methods.ssf import SSF
from peftcli.train import checkpoint
from tests.train.conftest import MakeLoop, loops

FOLDER = Path(__file__).parent
METHODS: dict[str, Method] = {
    "lora": LoRA(r=1, dropout=0.2, target_modules=("q",)),  # in peft's format
    "ssf": SSF(target_modules=("q",)),  # in our own
}
STOP, TOTAL = 2, 4  # steps


def training(make_loop: MakeLoop, folder: Path, name: str) -> Any:
    """The loop whose checkpoint is kept, at its first step."""
    return make_loop(folder=folder, method=METHODS[name], max_steps=TOTAL, save_steps=STOP)


def answers(host: Host) -> list[float]:
    """A few logits."""
    with torch.no_grad():
        return host.model.eval()(torch.arange(5, 17)[None]).logits[0, -1, :8].tolist()


def main() -> None:
    """Train both, and keep what they left in the middle, and what came after."""
    there = FOLDER / f"format-{checkpoint.FORMAT}"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, loops(Path(name)) as make_loop:
        for method in METHODS:
            loop = training(make_loop, Path(name) / method, method)
            loop.fit()
            place = there / method
            shutil.rmtree(place, ignore_errors=True)
            middle = f"step-{STOP:06d}"
            shutil.copytree(loop.folder.checkpoints / middle, place / "checkpoints" / middle)
            adapter.save(loop.host, "default", place / "adapter", "causal_lm", "tiny")
            losses = [record["loss"] for record in loop.screen.records]
            found = {"losses": losses, "logits": answers(loop.host)}
            (place / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
