"""What the processes of a run lose to talking: time in collectives after the last of them came.

    python scripts/bench/talking.py [--steps 200] [--rounds 3] [--json] [WORDS of peft-train ...]

Two processes train with `strategy=ddp`, one thread each. A process that is ahead waits inside a
collective for the other, because its examples are shorter or the machine gave it more time; that is
no talk. So what counts of each is the time from the moment at which both are inside to that at
which both are out. Without WORDS, LoRA trains on a tiny random Llama, 16 examples in each process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_step import where
from processes import words_of_a_run
from startup import environment

RANKS = 2
WARM_UP = 10  # steps
COLLECTIVES = ("all_reduce", "broadcast", "all_gather")
PORT = 29653


def work(record: Path, words: list[str]) -> int:
    """Be one process of a run: write when each step began, and each collective's ends, in seconds
    of the machine's clock.
    """
    import torch.distributed as dist

    from peftcli.cli import main
    from peftcli.train.loop import Loop

    spans: list[tuple[float, float]] = []
    steps: list[tuple[int, float]] = []  # collectives before it, its beginning

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = collective(*args, **kwargs)
            spans.append((begun, time.perf_counter()))
            return result

        return call

    for name in COLLECTIVES:
        setattr(dist, name, timed(getattr(dist, name)))
    step = Loop.step

    def marked(loop: Loop, examples: Any) -> float:
        steps.append((len(spans), time.perf_counter()))
        return step(loop, examples)

    setattr(Loop, "step", marked)  # noqa: B010 - a plain assignment is no type's method
    code = main(words)
    record.write_text(json.dumps({"spans": spans, "steps": steps}))
    return code


def talk(place: Path, words: list[str]) -> dict[str, float]:
    """Of one run, medians over its steps: milliseconds, and those in collectives, talking and on
    the whole; and collectives a step.
    """
    ranks = [_start(place, rank, words) for rank in range(RANKS)]
    for process in ranks:
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{printed}\nexit code {process.returncode}")
    records = [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    spans = list(zip(*(r["spans"] for r in records), strict=True))
    steps = records[0]["steps"][WARM_UP:]
    rows = []
    for (first, begun), (last, ended) in pairwise(steps):
        both = spans[first:last]
        talked = sum(max(e for _, e in ends) - max(b for b, _ in ends) for ends in both)
        inside = sum(ends[0][1] - ends[0][0] for ends in both)
        rows.append((ended - begun, talked, inside, last - first))
    ms, talked, inside, count = (statistics.median(column) for column in zip(*rows, strict=True))
    share = statistics.median(row[1] / row[0] for row in rows)
    return {
        "ms": 1e3 * ms,
        "talking": 1e3 * talked,
        "with waiting": 1e3 * inside,
        "collectives": count,
        "share": share,
    }


def _start(place: Path, rank: int, words: list[str]) -> subprocess.Popen[str]:
    env = {
        **environment(),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)},
    }
    command = [sys.executable, __file__, "--record", str(place / f"rank-{rank}.json"), *words]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def main() -> None:
    """Run a few times, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    if args.record:
        sys.exit(work(args.record, args.words))
    with tempfile.TemporaryDirectory() as name:
        words = words_of_a_run(Path(name), args.words, args.steps)
        rows = [
            talk(Path(name), [*words, "strategy=ddp", f"run_dir={name}/{i}"])
            for i in range(args.rounds)
        ]
    if args.json:
        print(json.dumps({"where": where(), "rows": rows}, indent=2))
        return
    print(f"{where()}\n{args.steps} steps\n")
    print("| ms a step | talking | share | with waiting | collectives |\n|---|---|---|---|---|")
    for row in rows:
        told = f"{row['talking']:.2f} | {row['share']:.1%} | {row['with waiting']:.2f}"
        print(f"| {row['ms']:.1f} | {told} | {row['collectives']:.0f} |")


if __name__ == "__main__":
    main()
