"""Kill a run again and again, and see that nothing of it remains.

    python scripts/soak.py [--cycles 40] [--seed 0] [WORDS of peft-train ...]

A run that saves every second step is trained once in one go, and once in cycles: started, killed by
SIGKILL at a random moment after a new checkpoint (often inside the next save), and started again,
until it is finished. Then both must have published the same adapter to the last bit, no file of a
killed save may be left, and neither memory nor open files may have grown over the saves of the run
in one go. Without WORDS, LoRA trains on a tiny random Llama. Exit code 0 where all holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPAN = 0.06  # seconds after a new checkpoint within which the kill comes


@dataclass
class Outcome:
    """What the soak found."""

    kills: int = 0
    saves: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)  # KiB at each save of the run in one go
    files: list[int] = field(default_factory=list)  # open at the same moments
    wrong: list[str] = field(default_factory=list)

    def growth(self, values: Sequence[int]) -> float:
        """Least value of the last third over that of the second one: a moment inside a save has
        more, a leak has more at every moment.
        """
        third = max(len(values) // 3, 1)
        return min(values[-third:]) / min(values[third : 2 * third] or values)

    def in_words(self) -> str:
        """One line."""
        return (
            f"{self.kills} kills, {self.saves} saves in one go, {self.seconds:.0f} s; memory x "
            f"{self.growth(self.memory):.3f} ({self.memory[-1] / 1024:.0f} MiB), open files x "
            f"{self.growth(self.files):.3f} ({self.files[-1]}); "
            + ("; ".join(self.wrong) or "same adapter, nothing left over")
        )


def tiny_words(place: Path) -> list[str]:
    """A run of LoRA on a tiny Llama and forty made-up chats."""
    sys.path.insert(0, str(ROOT))
    from tests import tiny

    tiny.tiny_llama(place / "llama")
    with open(place / "chats.jsonl", "w", encoding="utf-8") as file:
        for i in range(40):
            asked, said = f"what is {i} plus one", f"it is {i + 1}"
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return [
        *("+recipe=lora_llama_chat", f"model.name_or_path={place / 'llama'}", "method.dropout=0.1"),
        *(f"dataset.path={place / 'chats.jsonl'}", "dataset.eval_samples=4"),
        *("trainer.per_device_train_batch_size=2", "trainer.num_threads=1"),
    ]


def start(words: Sequence[str]) -> int:
    """The id of a process, forked from this one, that runs `peft-train`."""
    child = os.fork()
    if child == 0:
        from peftcli.cli import main

        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        os._exit(main(words))
    return child


def ended(child: int) -> int | None:
    """The exit code, negative for a signal; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def newest(run: Path) -> str:
    """The name of the newest checkpoint, or nothing."""
    try:
        return (run / "checkpoints" / "latest").read_text()
    except FileNotFoundError:
        return ""


def in_one_go(words: Sequence[str], run: Path, outcome: Outcome) -> None:
    """Train without a kill; note memory and open files at every save."""
    child, seen = start([*words, f"run_dir={run}"]), ""
    while (code := ended(child)) is None:
        if (now := newest(run)) != seen:
            seen, outcome.saves = now, outcome.saves + 1
            pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
            outcome.memory.append(pages * os.sysconf("SC_PAGE_SIZE") // 1024)
            outcome.files.append(len(os.listdir(f"/proc/{child}/fd")))
        time.sleep(0.002)
    if code:
        outcome.wrong.append(f"the run in one go ended with {code}")


def in_cycles(words: Sequence[str], run: Path, cycles: int, outcome: Outcome) -> None:
    """Train with up to `cycles` kills, and then to the end."""
    while True:
        before, child = newest(run), start([*words, f"run_dir={run}"])
        while (code := ended(child)) is None and (outcome.kills >= cycles or newest(run) == before):
            time.sleep(0.002)
        if code is None:
            time.sleep(random.uniform(0, SPAN))
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            break
        outcome.kills += 1
    if code:
        outcome.wrong.append(f"a run after {outcome.kills} kills ended with {code}")


def compare(straight: Path, killed: Path, outcome: Outcome) -> None:
    """What must be the same, and what must not be there."""
    published = Path("adapter") / "adapter_model.safetensors"
    pair = [folder / published for folder in (straight, killed)]
    if not all(file.is_file() for file in pair):
        outcome.wrong.append("an adapter is missing")
    elif pair[0].read_bytes() != pair[1].read_bytes():
        outcome.wrong.append("the adapters differ")
    left = [p for p in killed.rglob(".*") if p.name not in (".hydra", ".lock")]
    if left:
        outcome.wrong.append(f"left over: {', '.join(str(p.relative_to(killed)) for p in left)}")
    for name, values in (("memory", outcome.memory), ("open files", outcome.files)):
        if outcome.growth(values) > 1.02:
            outcome.wrong.append(f"{name} grew")


def soak(words: Sequence[str], cycles: int, seed: int, place: Path) -> Outcome:
    """Both runs, in folders in `place`."""
    random.seed(seed)
    outcome, begun = Outcome(), time.monotonic()
    in_one_go(words, place / "straight", outcome)
    in_cycles(words, place / "killed", cycles, outcome)
    compare(place / "straight", place / "killed", outcome)
    outcome.seconds = time.monotonic() - begun
    return outcome


def main() -> int:
    """Parse, soak, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=40, help="kills at most (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("words", nargs="*", help="of peft-train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        place = Path(name)
        words = args.words or [*tiny_words(place), f"trainer.max_steps={12 * args.cycles}"]
        from peftcli import run, train  # noqa: F401 - once, for all that are forked from here

        outcome = soak([*words, "trainer.save_steps=2"], args.cycles, args.seed, place)
    print(outcome.in_words())
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
