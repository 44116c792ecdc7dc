"""Time and memory of a LoRA step against length, batch, rank and depth, ours and HF peft's.

    python scripts/bench/scaling.py [--dtype float32] [--rounds 3] [--only length rank] [--json]

One of the four changes at a time, around 2 rows of 128 tokens, rank 16, all 30 layers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from lora_step import Work, median, peak, race_steps, ratio, where

AXES = {
    "length": (32, 128, 512, 1024),
    "batch": (1, 2, 8),
    "rank": (4, 16, 64),
    "layers": (8, 16, 30),
}


def main() -> None:
    """Race each point by itself, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base, rows = Work(args.dtype, batch=2, length=128), []
    for axis in args.only:
        for value in AXES[axis]:
            work = replace(base, **{axis: value})
            answers = race_steps([("hf", work), ("ours", work)], args.rounds)
            hf, ours = answers["hf", work], answers["ours", work]
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "hf": median(hf),
                    "ours": median(ours),
                    "speed": ratio(ours, hf),
                    "hf_peak": peak(hf),
                    "ours_peak": peak(ours),
                }
            )
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n2 x 128 tokens, rank 16, 30 layers, {args.dtype}, {args.rounds} rounds\n")
    print("| | HF peft, s | ours, s | speed | HF peft, MiB | ours, MiB |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['axis']} {r['value']} | {r['hf']:.3f} | {r['ours']:.3f} | {r['speed']:.2f} | "
            f"{r['hf_peak']:,.0f} | {r['ours_peak']:,.0f} |"
        )


if __name__ == "__main__":
    main()
