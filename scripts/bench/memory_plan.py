"""The memory that `peft-train check` announces, against what a few training steps really take.

    python scripts/bench/memory_plan.py [--steps 3] [--only NAME ...] [--json]

Each configuration plans and trains in a process of its own. Measured is the most resident memory
(on a GPU, the most allocated) from the first step on, loading left out. `ratio` is announced /
measured for the whole process, `own` without interpreter, libraries and data, which no plan can
change.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

LLAMA, MINILM = "+recipe=lora_llama", "+recipe=lora_minilm"
FOUR = "trainer.per_device_train_batch_size=4"
EIGHT = "trainer.per_device_train_batch_size=8"
SHORT = ("trainer.eval_on_start=false", "trainer.rehearse=false")
CASES: dict[str, list[str]] = {
    "LoRA, Llama, 4 examples": [LLAMA, FOUR],
    "LoRA, Llama, 8 examples": [LLAMA, EIGHT],
    "LoRA, Llama, padded": [LLAMA, EIGHT, "dataset.packing=false"],
    "LoRA, Llama, recomputed": [LLAMA, EIGHT, "trainer.gradient_checkpointing=true"],
    "LoRA, Llama, 4 x 2": [LLAMA, FOUR, "trainer.gradient_accumulation_steps=2"],
    "DoRA, Llama": [LLAMA, FOUR, "method=dora"],
    "OFT, Llama": [LLAMA, FOUR, "method=oft"],
    "prompt tuning, Llama": [LLAMA, FOUR, "method=prompt_tuning"],
    "full, Llama": [LLAMA, FOUR, "method=full"],
    "LoRA, MiniLM, 64 examples": [MINILM, "trainer.per_device_train_batch_size=64"],
    "SSF, MiniLM, 64 examples": [MINILM, "trainer.per_device_train_batch_size=64", "method=ssf"],
    "full, MiniLM, 64 examples": [
        "+recipe=full_minilm",
        "trainer.per_device_train_batch_size=64",
    ],
}


def measure(words: list[str]) -> dict[str, Any]:
    """Announced and measured bytes of a configuration, in this process."""
    from peftcli import budget, config
    from peftcli.build import adapt, build
    from peftcli.run import make_loop
    from peftcli.screen import hidden_screen
    from peftcli.train import device
    from peftcli.train.folder import RunFolder
    from peftcli.train.loop import Loop
    from peftcli.train.signals import Stopper

    with tempfile.TemporaryDirectory() as name:
        cfg = config.compose([*words, *SHORT, f"run_dir={name}"])
        parts = build(config.typed(cfg))
        adapt(parts)
        loop: Loop = make_loop(parts, cfg, RunFolder(Path(name)), hidden_screen(), Stopper())
        device.release_freed()  # what loading has freed goes back
        held = budget.estimate(parts, loop.plan, loop.optimizer).held
        memory = budget.measure(parts, loop.plan, held, whole=True)
        loop.evaluate = None
        loop.save = lambda *_: Path(name)
        if parts.device.type == "cuda":
            loop.fit()
            measured = device.peak_memory(parts.device)
        else:
            device.release_freed()
            before = device.resident_memory()
            measured = before + device.growth(loop.fit)[0]
    return {
        "announced": memory.total,
        "measured": measured,
        "turning": memory.working.turning.at(memory.load.tokens),
        "tokens": memory.load.tokens,
        "activations": memory.activations,
        "logits": memory.logits,
        "gaps": memory.gaps,
        **asdict(held),
    }


def main() -> None:
    """Parse, measure each in its process, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure([*CASES[args.one], f"trainer.max_steps={args.steps}"])))
        return
    if not args.json:
        print("| configuration | tokens | announced, MiB | measured, MiB | ratio | own |")
        print("|---|---|---|---|---|---|")
    rows = {}
    for case in args.only:
        command = [sys.executable, __file__, "--one", case, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case}: {done.stderr}")
        rows[case] = json.loads(done.stdout.splitlines()[-1])
        if not args.json:
            print(line(case, rows[case]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


def line(case: str, r: dict[str, Any]) -> str:
    """A row of the table."""
    ratio = r["announced"] / r["measured"]
    own = (r["announced"] - r["process"]) / (r["measured"] - r["process"])
    sizes = " | ".join(f"{r[key] / 2**20:,.0f}" for key in ("announced", "measured"))
    return f"| {case} | {r['tokens']:,} | {sizes} | {ratio:.2f} | {own:.2f} |"


if __name__ == "__main__":
    main()
