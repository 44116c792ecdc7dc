"""What two processes lose to talking: a step of each strategy by that of two runs side by side.

    python scripts/bench/processes.py [--steps 60] [--rounds 3] [--strategies ddp fsdp]
    [--json] [WORDS of peft-train ...]

Two runs that know nothing of each other, each with half of the threads, cost what the cores and
their memory cost; two processes of one run do the same products on them and talk in between.
Printed are medians of a step's milliseconds over the rounds, in turn, and their ratio. Without
WORDS, LoRA trains on a tiny random Llama, 16 examples in each process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_step import where
from startup import PROGRAM, environment

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak import tiny_words

ALONE = "two runs side by side"


def medians(runs: list[list[str]]) -> float:
    """Milliseconds of a step of these runs at once: the median over steps, the mean over runs."""
    started = [
        subprocess.Popen(
            [PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for words in runs
    ]
    for process in started:
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{printed}\nexit code {process.returncode}")
    return statistics.mean(map(step_time, runs))


def step_time(words: list[str]) -> float:
    """Milliseconds of a step of a finished run, the median without its first ten."""
    folder = Path(words[-1].removeprefix("run_dir="))
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    taken = [r["wall"]["seconds"] for r in records if "loss" in r]
    return 1e3 * statistics.median(taken[10:])


def words_of_a_run(place: Path, words: list[str], steps: int) -> list[str]:
    """These words of `peft-train`, or those of LoRA on a tiny Llama, for so many steps of a process
    with its share of the threads.
    """
    tiny = [*tiny_words(place), "trainer.per_device_train_batch_size=16", "dataset.max_length=512"]
    threads = max((os.cpu_count() or 2) // 2, 1)
    return [
        *(words or tiny),
        *("trainer.rehearse=false", "trainer.longest_first=false"),
        *(f"trainer.num_threads={threads}", f"trainer.max_steps={steps}"),
    ]


def main() -> None:
    """Run all in turn, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        words = words_of_a_run(place, args.words, args.steps)
        for i in range(args.rounds):
            alone = [[*words, f"run_dir={place / f'alone-{i}-{j}'}"] for j in range(2)]
            times.setdefault(ALONE, []).append(medians(alone))
            for strategy in args.strategies:
                two = [f"strategy={strategy}", "launch.num_processes=2"]
                run = [*words, *two, f"run_dir={place / f'{strategy}-{i}'}"]
                times.setdefault(strategy, []).append(medians([run]))
    rows = {
        what: {
            "ms": statistics.median(took),
            "ratio": statistics.median(t / a for t, a in zip(took, times[ALONE], strict=True)),
        }
        for what, took in times.items()
    }
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n{args.rounds} rounds of {args.steps} steps\n")
    print("| | ms a step | by two runs side by side |\n|---|---|---|")
    for what, row in rows.items():
        print(f"| {what} | {row['ms']:.1f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
