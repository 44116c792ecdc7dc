"""What the loop itself costs: the part of a training step that is neither the model's forward and
backward pass, nor clipping, nor the optimizer's step.

    python scripts/bench/overhead.py [--steps 30] [WORDS of peft-train ...]

Metrics are written and shown as in every run. Printed are medians over the steps, in milliseconds,
and the share of the loop: collating examples, looking at numbers, records, schedule and hooks.
Without WORDS, full fine-tuning of MiniLM, whose steps are short and whose tensors are many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("+recipe=full_minilm",)


class Clock:
    """Sums up the seconds that calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, on the clock."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure(words: list[str], steps: int) -> list[tuple[float, float]]:
    """(seconds of the step, of them in model, clipping and optimizer) of each step."""
    from peftcli import config
    from peftcli.build import adapt, build
    from peftcli.run import make_loop
    from peftcli.screen import LiveScreen
    from peftcli.train.folder import RunFolder
    from peftcli.train.signals import Stopper

    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        short = ("trainer.rehearse=false", f"trainer.max_steps={steps + 2}")
        cfg = config.compose([*words, *short, f"run_dir={name}"])
        parts, clock, screen = build(config.typed(cfg)), Clock(), LiveScreen()
        adapt(parts)
        loop: Any = make_loop(parts, cfg, RunFolder(Path(name)), screen, Stopper())
        loop.evaluate, loop.save, step = None, lambda *_: Path(name), loop.step
        loop.forward_backward = clock.around(loop.forward_backward)
        loop.strategy.clip = clock.around(loop.strategy.clip)
        loop.optimizer.step = clock.around(loop.optimizer.step)

        def watched(examples: Any) -> float:
            before, start = clock.seconds, time.perf_counter()
            loss = step(examples)
            found.append((time.perf_counter() - start, clock.seconds - before))
            return loss

        loop.step = watched
        with screen.training(loop.plan.total, 0):
            loop.fit()
    return found[2:]  # the first two warm up


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("words", nargs="*", default=WORDS, metavar="WORDS")
    args = parser.parse_args()
    found = measure(list(args.words), args.steps)
    step = statistics.median(whole for whole, _ in found)
    own = statistics.median(whole - inside for whole, inside in found)
    share = statistics.median((whole - inside) / whole for whole, inside in found)
    print(f"step {step * 1e3:.1f} ms, the loop's own {own * 1e3:.2f} ms, {share:.1%} of a step")


if __name__ == "__main__":
    main()
