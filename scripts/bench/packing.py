"""Rows of uneven lengths: ours, packed, against Hugging Face peft's, padded to the longest.

    python scripts/bench/packing.py [--dtype float32] [--batch 8] [--sigma 0.5 0.7 0.9]
    [--rounds 5] [--json]

Lengths are log-normal around a median of 94 tokens (a mean of 120 at sigma 0.7). Speed is real
tokens a second, HF peft = 1.
"""

from __future__ import annotations

import argparse
import json

from lora_step import Work, median, peak, race_steps, ratio, where


def main() -> None:
    """Race each spread by itself, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sigma", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for sigma in args.sigma:
        work = Work(args.dtype, args.batch, length=94, sigma=sigma)
        answers = race_steps([("hf", work), ("ours", work)], args.rounds)
        hf, ours = answers["hf", work], answers["ours", work]
        rows.append(
            {
                "sigma": sigma,
                "real": work.tokens / (work.batch * max(map(len, work.rows()))),
                "hf": work.tokens / median(hf),
                "ours": work.tokens / median(ours),
                "speed": ratio(ours, hf),
                "memory": peak(ours) / peak(hf),
            }
        )
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n{args.batch} rows, {args.dtype}, {args.rounds} rounds\n")
    print("| sigma | real of padded | HF peft, tokens/s | ours, tokens/s | speed | memory |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['sigma']} | {r['real']:.2f} | {r['hf']:.0f} | {r['ours']:.0f} | "
            f"{r['speed']:.2f} | {r['memory']:.2f} |"
        )


if __name__ == "__main__":
    main()
