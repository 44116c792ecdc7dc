"""Rows of uneven lengths: ours, packed, against Hugging Face peft's, padded to the longest.

    python scripts/bench/packing.py [--dtype float32] [--batch 8] [--sigma 0.5 0.7 0.9]
    [--variants ours ours_compiled floor] [--layers 30] [--rounds 5] [--json]

Lengths are log-normal around a median of 94 tokens (a mean of 120 at sigma 0.7). Speed is real
tokens a second, HF peft = 1.
"""

from __future__ import annotations

import argparse
import json

from lora_step import VARIANTS, Work, median, peak, race_steps, ratio, where


def main() -> None:
    """Race each spread by itself, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sigma", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ours"])
    parser.add_argument("--layers", type=int, help="the first of the model; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for sigma in args.sigma:
        work = Work(args.dtype, args.batch, length=94, sigma=sigma, layers=args.layers)
        answers = race_steps(
            [(v, work) for v in dict.fromkeys(["hf", *args.variants])], args.rounds
        )
        hf = answers["hf", work]
        rows += [
            {
                "sigma": sigma,
                "variant": variant,
                "real": work.tokens / (work.batch * max(map(len, work.rows()))),
                "tokens": work.tokens / median(got),
                "speed": ratio(got, hf),
                "memory": peak(got) / peak(hf),
            }
            for (variant, _), got in answers.items()
        ]
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n{args.batch} rows, {args.dtype}, {args.rounds} rounds\n")
    print("| sigma | real of padded | variant | real tokens/s | speed | memory |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['sigma']} | {r['real']:.2f} | {r['variant']} | {r['tokens']:.0f} | "
            f"{r['speed']:.2f} | {r['memory']:.2f} |"
        )


if __name__ == "__main__":
    main()
