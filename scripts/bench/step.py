"""One LoRA training step, ours against Hugging Face peft's, alternating in one run, each in its own
process.

    python scripts/bench/step.py [--dtype float32 bfloat16] [--batch 4] [--length 256] [--rounds 7]
    [--variants hf ours hf_compiled floor] [--layers 30] [--json]

SmolLM2-135M, LoRA r=16 on all linears, every position a target, AdamW step included. Prints
medians, ratios to HF peft of the same type, and peak memory (on the CPU resident, the loader
included). Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from lora_step import VARIANTS, Work, median, peak, race_steps, ratio, where


def table(works: list[Work], variants: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each variant of each work."""
    answers = race_steps([(variant, work) for work in works for variant in variants], rounds)
    rows = []
    for (variant, work), got in answers.items():
        theirs = answers["hf", work]
        rows.append(
            {
                "variant": f"{variant} {work.dtype}",
                "seconds": median(got),
                "speed": ratio(got, theirs),
                "peak": peak(got),
                "memory": peak(got) / peak(theirs),
                "loss": got[0]["loss"] if got else None,
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["hf", "ours", "floor"])
    parser.add_argument("--layers", type=int, help="the first of the model; all by default")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    works = [Work(d, args.batch, args.length, layers=args.layers) for d in args.dtype]
    rows = table(works, list(dict.fromkeys(["hf", *args.variants])), args.rounds)
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n{args.batch} x {args.length} tokens, {args.rounds} rounds\n")
    print("| variant | s a step | speed, HF peft = 1 | peak, MiB | memory, HF peft = 1 |")
    print("|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['variant']} | {r['seconds']:.3f} | {r['speed']:.2f} | {r['peak']:,.0f} | "
            f"{r['memory']:.2f} |"
        )


if __name__ == "__main__":
    main()
