"""The command line: verbs, help, exit codes. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peftcli import __version__, interrupts, verbs
from peftcli.arguments import Parser, is_run_folder, positive
from peftcli.dist import causes, slurm
from peftcli.errors import OF_DISKS, ConfigError, DataError, UserError
from peftcli.pages import HELP, TRAIN_HELP, page
from peftcli.tables import verbs as results

if TYPE_CHECKING:
    from omegaconf import DictConfig


# Threads spin for some hundred microseconds, from one small product to the next, and then sleep.
# Two runs on the same two cores take twice as long where threads spin as long as libgomp likes; at
# once asleep, one alone loses a fifteenth.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
# A rank that comes before the one that all meet at tries again; forty lines of C++ would say so.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name, value in (WAITING | QUIET).items():
        os.environ.setdefault(name, value)
    try:
        code = dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as e:  # argparse after --help
        return int(e.code or 0)
    except BrokenPipeError:  # the reader (head, less) went away
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as e:
        return ended_by(e)


def ended_by(e: BaseException) -> int:
    """Say what ended a command; the exit code."""
    if isinstance(e, KeyboardInterrupt) or interrupts.heard:  # libraries turn the one into others
        return interrupts.recorded()
    if isinstance(e, UserError):
        if shows_tracebacks():
            traceback.print_exc()
        return failed(str(e), e.exit_code)
    if isinstance(e, OSError) and e.errno in OF_DISKS:
        return failed(f"{e.strerror}: {e.filename or 'a file of the run'}", DataError.exit_code)
    what = f"unexpected {type(e).__name__}: {e}\nThis is a mistake of peftcli; its trace:"
    return failed(f"{what}\n{traceback.format_exc().rstrip()}", 1)


def failed(text: str, code: int) -> int:
    """Show why a command failed, in the run's log too; one of a run's ranks leaves the screen to
    the launcher.
    """
    log = logging.getLogger("peftcli")
    if log.handlers:
        log.error("error: %s", text)
    if not causes.record(text, code):
        print_error(text)
    return code


def dispatch(words: list[str]) -> int:
    """The verb's function; without a verb, `train`."""
    words = [w for w in words if not w.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    if not words or words[0] in ("-h", "--help", "help"):
        print(page(HELP))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"peftcli {__version__}")
        return 0
    verb, rest = (words[0], words[1:]) if words[0] in VERBS else ("train", words)
    return VERBS[verb](rest)


def shows_tracebacks() -> bool:
    """Whether the user asked for the trace of every error."""
    return "1" in (os.environ.get("PEFTCLI_TRACEBACK"), os.environ.get("HYDRA_FULL_ERROR"))


def print_error(text: str) -> None:
    """`error: ...` in red on stderr, as it is: neither wrapped nor read as markup."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {text}", style="red"), soft_wrap=True, highlight=False)


# -- train -----------------------------------------------------------------------------------------
def train(words: list[str]) -> int:
    """Compose, check, and train in this process; with -m, one process a member."""
    if "-h" in words or "--help" in words:
        print(page(TRAIN_HELP))
        return 0
    from peftcli import hydra_app

    slurm.translate(os.environ)
    interrupts.until_a_run_has_its_own()
    args = hydra_app.parse(words)
    if args.overrides and is_run_folder(args.overrides[0]):
        return resume(Path(args.overrides[0]), args.overrides[1:], args.config_dirs)

    def check(cfg: DictConfig) -> None:
        from peftcli import config

        config.typed(cfg, args.config_dirs)

    def task(cfg: DictConfig, folder: Path) -> int:
        from peftcli import config, run

        return run.train(config.typed(cfg, args.config_dirs), cfg)

    # started by another launcher: rank 0 alone writes what Hydra does
    if os.environ.get("RANK", "0") != "0" and not args.multirun:
        name = args.config_name or hydra_app.cards.ROOT
        cfg = hydra_app.compose(args.overrides, args.config_dirs, name)
        return task(cfg, Path(cfg.run_dir))

    return hydra_app.main(args, check, task, sweep)


def sweep(args: argparse.Namespace) -> int:
    """Every member of a sweep in a process of its own."""
    if "RANK" in os.environ:
        raise ConfigError(
            "a sweep starts the processes of its runs itself: start it once, without torchrun and "
            "without further tasks of srun."
        )
    if any(word.startswith("+table") for word in args.overrides):
        from peftcli.sweep import of_table

        return of_table.main(args)
    from peftcli.sweep import engine

    return engine.main(args)


def resume(folder: Path, overrides: Sequence[str], config_dirs: Sequence[Path]) -> int:
    """Go on with the run of a folder."""
    from peftcli import config, run

    cfg = config.load(folder, overrides, config_dirs)
    return run.train(config.typed(cfg, config_dirs), cfg)


def worker(words: list[str]) -> int:
    """One member of a sweep, started by process PARENT: train what RUN_DIR/config.yaml says."""
    if len(words) != 2:
        raise ConfigError("peft-train worker RUN_DIR PARENT: a folder and a process.")
    os.environ[causes.MEMBER] = words[0]
    end_with_parent(int(words[1]))
    return resume(Path(words[0]), (), ())


def sweep_worker(words: list[str]) -> int:
    """Work on a sweep that exists, beside whoever else does."""
    parser = Parser(
        prog="peft-train sweep-worker",
        description="Work on a sweep's members beside other processes, on any machine that sees "
        "its folder; ends when all members have ended.",
    )
    parser.add_argument("folder", type=Path, metavar="SWEEP_DIR", help="a sweep's folder")
    parser.add_argument("--jobs", type=positive, help="members at once (sweep.jobs of the line)")
    parser.add_argument("--stop-file", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    interrupts.until_a_run_has_its_own()
    from peftcli.sweep import engine

    return engine.join(args.folder, args.jobs, args.stop_file)


def rank(words: list[str]) -> int:
    """One process of a run that our launcher started: train what the file says."""
    if len(words) != 1:
        raise ConfigError("peft-train rank CONFIG_FILE: one file.")
    end_with_parent(os.getppid())
    from omegaconf import OmegaConf

    from peftcli import config, run

    cfg = cast("DictConfig", OmegaConf.load(words[0]))
    return run.train(config.typed(cfg), cfg)


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM, after which a run saves and stops, when the process that
    started this one dies; raises `KeyboardInterrupt` where it is gone already.
    """
    interrupts.until_a_run_has_its_own()
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        raise KeyboardInterrupt


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check": verbs.check,
    "verify-resume": verbs.verify_resume,
    "eval": verbs.evaluate,
    "generate": verbs.generate,
    "export": verbs.export,
    "table": results.table,
    "diff": results.diff,
    "report": results.report,
    "plot": results.plot,
    "methods": verbs.methods,
    "explain": verbs.explain,
    "doctor": verbs.doctor,
    "worker": worker,
    "sweep-worker": sweep_worker,
    "rank": rank,
}
