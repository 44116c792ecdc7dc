"""Seconds until an answer: the commands that load no model, and the first optimizer step of a run.

    python scripts/bench/startup.py [--rounds 5] [--compiled] [--json]

The first step is timed from the start of the process, with model and data prepared before:
`+recipe=lora_llama`, and a plain script with Hugging Face peft that does the same step (16 chats,
LoRA on all linears, AdamW) on the same folder. They alternate. `--compiled` times the first step of
`trainer.compile=true` too, with nothing compiled before, and with what that compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_step import base_dtype, where

PROGRAM = str(Path(sys.executable).with_name("peft-train"))
COMMANDS = (["--help"], ["methods"], ["+recipe=lora_llama", "--cfg", "job"])
FIRST_STEP = [
    "+recipe=lora_llama",
    "trainer.max_steps=1",
    "trainer.eval_on_start=false",
    "trainer.longest_first=false",  # a second pass through the model before the first step
    "dataset.eval_samples=1",
]


def seconds(command: list[str], until: str | None = None, **more: str) -> float:
    """From the start of the command to its end, or to its first line that begins with `until`, in
    an environment with `more`.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), **more},
    )
    assert process.stdout
    passed = None
    for line in process.stdout:
        if until and passed is None and line.startswith(until):
            passed = time.perf_counter() - start
    code = process.wait()
    if code or (until and passed is None):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return time.perf_counter() - start if passed is None else passed


def environment() -> dict[str, str]:
    """Offline, with plain output."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


# -- the same step, written by hand ----------------------------------------------------------------
def prepared(words: list[str], folder: Path) -> tuple[Any, str, Any, Any]:
    """A run, the folder of its model, its tokenizer and its data."""
    from peftcli import config
    from peftcli.data.prepare import prepare
    from peftcli.models import inputs
    from peftcli.models.convert import folder_of
    from peftcli.models.source import cache_dir, resolve

    run = config.typed(config.compose([*words, f"run_dir={folder}"]))
    source = resolve(run.model, cache_dir())
    tokenizer = inputs.load_tokenizer(source, run.model)
    data = prepare(run.dataset, "causal_lm", tokenizer, cache_dir=cache_dir() / "data")
    return run, str(folder_of(source)), tokenizer, data


def write_chats(folder: Path) -> Path:
    """The first batch of the recipe as chats, beside the folder of the model."""
    run, model, tokenizer, data = prepared(FIRST_STEP, folder)
    rows = [data.train[i] for i in range(run.trainer.per_device_train_batch_size)]
    chats = [tokenizer.decode(row["input_ids"]) for row in rows]
    path = folder / "chats.json"
    path.write_text(json.dumps({"model": model, "chats": chats}))
    return path


def plain(path: Path) -> None:
    """One optimizer step with Hugging Face peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = json.loads(path.read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(given["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(given["model"], dtype=base_dtype())
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = tokenizer(given["chats"], return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    print("step 1", flush=True)


def main() -> None:
    """Time everything in turn, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return plain(args.plain)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        chats = write_chats(Path(name))
        for i in range(args.rounds):
            for words in COMMANDS:
                took = seconds([PROGRAM, *words])
                times.setdefault(f"peft-train {' '.join(words)}", []).append(took)
            ours = [PROGRAM, *FIRST_STEP, f"run_dir={name}/{i}"]
            times.setdefault("first step, ours", []).append(seconds(ours, "step 1"))
            hf = [sys.executable, __file__, "--plain", str(chats)]
            times.setdefault("first step, HF peft", []).append(seconds(hf, "step 1"))
            if args.compiled:
                kept = {"TORCHINDUCTOR_CACHE_DIR": f"{name}/compiled-{i}"}
                for what in ("cold", "warm"):
                    words = [*ours[:-1], f"run_dir={name}/{i}-{what}", "trainer.compile=true"]
                    took = seconds(words, "step 1", **kept)
                    times.setdefault(f"first step, ours, compiled, {what}", []).append(took)
    rows = {what: statistics.median(took) for what, took in times.items()}
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return None
    print(f"{where()}\n{args.rounds} rounds\n\n| | s |\n|---|---|")
    for what, took in rows.items():
        print(
            f"| `{what}` | {took:.2f} |" if what.startswith("peft") else f"| {what} | {took:.2f} |"
        )
    return None


if __name__ == "__main__":
    main()
