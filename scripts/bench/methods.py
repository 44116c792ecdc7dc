"""Every method on one task: accuracy over seeds, best learning rate, size, step time, memory.

    python scripts/bench/methods.py [METHOD ...] [--recipe lora_minilm] [--out outputs/methods]
    [--markdown docs/methods.md]

For each method: one run for each rate of its grid with the tuning seed, then the best rate with the
test seeds, all over the same data in the same order for the same number of steps. A run that is
there already is not run again, so the command can be stopped and repeated. Step times are medians
relative to LoRA's of the same table: on a busy machine only large differences mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TUNING_SEED, TEST_SEEDS = 100, (0, 1, 2)
STEP = 3.0  # between the rates of a grid
CENTRE = {  # of the grid of rates, by family; methods whose scale is their own have theirs below
    "low-rank": 1e-3,
    "structured": 1e-3,
    "scale-shift": 3e-3,
    "selective": 3e-4,
    "sparse": 1e-3,
    "adapter": 1e-3,
    "prompt": 3e-3,
    "bridge": 1e-3,
}
OWN_CENTRE = {"bitfit": 1e-3, "fourierft": 3e-2, "full": 1e-4, "intrinsic_dimension": 3e-2}
OWN_CENTRE |= {"hft": 1e-4, "lisa": 1e-4, "vera": 1e-2, "prompt_tuning": 3e-2, "qwha": 3e-3}


def methods() -> dict[str, str]:
    """Every method by its file's name, with its family."""
    from peftcli import cards

    return {card.choice: cards.family(card.target) for card in cards.cards("method")}


def rates(method: str, family: str) -> tuple[float, ...]:
    """Three learning rates, evenly spaced on a logarithmic scale."""
    centre = OWN_CENTRE.get(method, CENTRE.get(family, 1e-3))
    return (centre / STEP, centre, centre * STEP)


def run_all(method: str, grid: list[float], recipe: str, out: Path, more: list[str]) -> None:
    """All runs of one method in this process; their results lie in the run folders."""
    from peftcli import config, run
    from peftcli.errors import UserError

    def once(lr: float, seed: int) -> dict[str, Any] | None:
        folder = out / method / f"lr{lr:.1e}_seed{seed}"
        if not (folder / "result.json").exists():
            words = [f"+recipe={recipe}", f"method={method}", f"optimizer.lr={lr}", f"seed={seed}"]
            cfg = config.compose([*words, f"run_dir={folder}", *more])
            try:
                run.train(config.typed(cfg), cfg)
            except UserError as e:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "refused.txt").write_text(str(e), encoding="utf-8")
                print(f"{method} lr={lr} seed={seed}: {e}", file=sys.stderr)
                return None
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))

    tuned = {lr: result for lr in grid if (result := once(lr, TUNING_SEED))}
    if tuned:
        best = max(tuned, key=lambda lr: accuracy(tuned[lr]))
        for seed in TEST_SEEDS:
            once(best, seed)


def accuracy(result: dict[str, Any]) -> float:
    """After training, on the held-out examples."""
    return result["train_info"]["metrics"]["after"]["accuracy"]


def rows(out: Path) -> list[dict[str, Any]]:
    """One row a method from the runs that are there."""
    table = []
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        runs = [json.loads(p.read_text()) for p in folder.glob("*/result.json")]
        test = [r for r in runs if r["run_info"]["seed"] in TEST_SEEDS]
        if not test:
            continue
        info = [r["train_info"] for r in test]
        values = [accuracy(r) for r in test]
        table.append(
            {
                "method": folder.name,
                "accuracy": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": len(values),
                "before": info[0]["metrics"]["before"]["accuracy"],
                "lr": test[0]["run_info"]["train_config"]["optimizer"]["lr"],
                "trained": info[0]["num_trainable_params"],
                "step": statistics.median(i["train_time"] / i["steps"] for i in info),
                "memory": max(i["peak_memory"] for i in info),
                "versions": test[0]["meta_info"]["package_info"],
            }
        )
    return table


def markdown(table: list[dict[str, Any]], command: str) -> str:
    """The table, best first, with the command that makes it."""
    lora = next((r["step"] for r in table if r["method"] == "lora"), None)
    lines = [
        f"Made by `{command}`.",
        "",
        "| method | accuracy | rate | trainable | step / LoRA | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted(table, key=lambda r: -r["accuracy"]):
        spread = "" if r["deviation"] is None else f" ± {100 * r['deviation']:.1f}"
        step = "" if lora is None else f"{r['step'] / lora:.2f}"
        lines.append(
            f"| {r['method']} | {100 * r['accuracy']:.1f}{spread} | {r['lr']:.1g} | "
            f"{r['trained']:,} | {step} | {r['memory'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, one process a method, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--recipe", default="lora_minilm")
    parser.add_argument("--out", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--set", nargs="*", default=[], help="further overrides for every run")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = methods()
    if args.one:
        grid = list(rates(args.one, known[args.one]))
        return run_all(args.one, grid, args.recipe, args.out, args.set)
    for method in [] if args.table_only else args.methods or known:
        words = [sys.executable, __file__, "--one", method, "--recipe", args.recipe]
        code = subprocess.call([*words, "--out", str(args.out), "--set", *args.set])
        if code:
            print(f"{method}: exit code {code}", file=sys.stderr)
    print(markdown(rows(args.out), f"python scripts/bench/methods.py --recipe {args.recipe}"))
    return None


if __name__ == "__main__":
    main()
