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
from typing import TYPE_CHECKING, Any, NoReturn, cast

from peftcli import __version__
from peftcli.dist import causes, slurm
from peftcli.errors import OF_DISKS, ConfigError, DataError, Stopped, UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from peftcli.settings import Run

FILE = "config.yaml"  # what makes a folder a run folder
HELP = """\
*peft-train* [VERB] [+recipe=NAME] [group=choice] [key=value ...]

*Verbs*
  train          train a run; meant where no verb is given; takes Hydra's flags (-m, --cfg job, -cd)
  check          everything but training: what would train, data and masks, steps, memory, time
  verify-resume  whether a configuration goes on bit for bit after a stop
  eval           measure a run folder's adapter on its held-out examples
  generate       let a run folder's adapter answer: one prompt, a file of them, or a chat
  export         write a run folder's adapter, or the model with it merged in, for other tools
  table          the table of a paper from run folders and sweeps: seeds, costs, what is missing
  diff           why two runs have different numbers: keys, data, versions, first step that differs
  report         one HTML page of many runs: table, curves, costs, differences
  plot           the figures of a paper: curves, learning rates, costs with the Pareto front
  methods        all methods, or the equation and the options of one
  explain        what a key or a group means, takes, and defaults to
  doctor         versions, hardware, and what is missing
  sweep-worker   work on a sweep's folder beside others, on any machine that sees it

*Examples*
  peft-train +recipe=lora_llama                                       a whole run, ready to go
  peft-train +recipe=lora_llama method.r=32 optimizer.lr=1e-4         the same with two keys changed
  peft-train check +recipe=lora_llama_chat dataset.path=chats.jsonl   look before you train
  peft-train -m +recipe=lora_llama method=lora,full seed=0,1,2        a sweep of six runs
  peft-train +recipe=lora_llama strategy=ddp launch.num_processes=2   the same run by two processes
  peft-train generate outputs/lora_llama/2026-01-31_12-00-00          talk to what was trained

*Files*
  recipes    {recipes}
  configs    {configs}
  yours      --config-dir DIR adds DIR/recipes/NAME.yaml, DIR/dataset/NAME.yaml, ...
  written    outputs/NAME/DATE_TIME, or run_dir=FOLDER; a run started again in its folder goes on

*Exit codes*
  0 done   1 failed   2 configuration or usage   3 data or checkpoint   4 out of memory
  5 non-finite numbers   75 stopped, resumable

`peft-train VERB --help` tells more. Tab completion: eval "$(peft-train -sc install=bash)"
"""
TRAIN_HELP = """\
*peft-train* [train] [+recipe=NAME] [group=choice] [key=value ...] [flags]
*peft-train* train RUN_FOLDER [key=value ...]                    go on with a run that was stopped

  +recipe=NAME        a whole run from recipes/NAME.yaml; `peft-train explain recipe` lists them
                      (its method and optimizer keys hold for its own choice of these)
  group=choice        model method quantization dataset trainer optimizer scheduler strategy launch
                      logger sweep
  key=value           one key: optimizer.lr=1e-4, 'method.target_modules=[q,k,v]'
  ~key  ++key=value   take a key out; set one that may be new

*Flags (Hydra's)*
  -m, --multirun      every combination of values a,b,c, each run in its own process; in sweep_dir,
                      by default multirun/NAME/DATE_TIME, where the same line goes on
  --dry-run           with -m: list the members, which are done, and what the others will cost
  --retry-failed      with -m: run those that failed again
  sweep.search=KIND   with -m: random, optuna or de instead; `peft-train explain sweep` tells more
  +table=NAME         with -m: the runs of a published table; `peft-train table +table` lists them
  -cd, --config-dir   a folder of your own with recipes/ and groups; what it holds wins over ours
  -cn, --config-name  a primary file other than config.yaml
  --cfg job|hydra|all [--resolve] [-p PACKAGE]    print the configuration and stop
  --info [all|config|defaults|defaults-tree|plugins|searchpath]
  -sc install=bash    tab completion          --hydra-help    Hydra's own page
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` tells more.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # threads that wait must sleep: spinning, two runs on the same cores take ten times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    except KeyboardInterrupt:
        causes.record("stopped before training; nothing to save", Stopped.exit_code)
        return Stopped.exit_code
    except UserError as e:
        if shows_tracebacks():
            traceback.print_exc()
        return failed(str(e), e.exit_code)
    except Exception as e:
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


def page(text: str) -> str:
    """A help page; *words* are bold on a terminal."""
    from peftcli import folders

    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for i in range(text.count("*")):
        text = text.replace("*", (bold, plain)[i % 2], 1)
    for kind in ("recipes", "configs"):
        text = text.replace(f"{{{kind}}}", folders.shown(folders.built_in(kind)))
    return text.rstrip()


# -- train -----------------------------------------------------------------------------------------
def train(words: list[str]) -> int:
    """Compose, check, and train in this process; with -m, one process a member."""
    if "-h" in words or "--help" in words:
        print(page(TRAIN_HELP))
        return 0
    from peftcli import hydra_app

    slurm.translate(os.environ)
    words = [w for w in words if not w.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    stop_on_signals()
    args = hydra_app.parse(words)
    if args.overrides and is_run_folder(args.overrides[0]):
        return resume(Path(args.overrides[0]), args.overrides[1:], args.config_dirs)
    from peftcli import config

    def check(cfg: DictConfig) -> None:
        config.typed(cfg, args.config_dirs)

    def task(cfg: DictConfig, folder: Path) -> int:
        from peftcli import run

        return run.train(config.typed(cfg, args.config_dirs), cfg)

    # started by another launcher: rank 0 alone writes what Hydra does
    if os.environ.get("RANK", "0") != "0":
        name = args.config_name or hydra_app.cards.ROOT
        cfg = hydra_app.compose(args.overrides, args.config_dirs, name)
        return task(cfg, Path(cfg.run_dir))

    return hydra_app.main(args, check, task, sweep)


def sweep(args: argparse.Namespace) -> int:
    """Every member of a sweep in a process of its own."""
    if "RANK" in os.environ:
        raise ConfigError("a sweep starts the processes of its runs itself: leave torchrun out.")
    if any(word.startswith("+table") for word in args.overrides):
        from peftcli.sweep import of_table

        return of_table.main(args)
    from peftcli.sweep import engine

    return engine.main(args)


def stop_on_signals() -> None:
    """Have signals end this process by `KeyboardInterrupt`, until a run's own handlers exist."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # a sweep blocks them while it forks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))


def _stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


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
    stop_on_signals()
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
    stop_on_signals()
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        raise KeyboardInterrupt


# -- Verbs on a run folder or on a configuration ---------------------------------------------------
def check(words: list[str]) -> int:
    """Everything but training."""
    parser = run_parser(
        "check",
        "Everything but training: what would train where, data and masks, steps, memory, time.",
    )
    args = parser.parse_intermixed_args(words)
    settings, cfg, _ = configuration(args)
    from peftcli import run

    return run.check(settings, cfg, as_json=args.json)


def verify_resume(words: list[str]) -> int:
    """Whether a run that was stopped goes on bit for bit."""
    parser = run_parser(
        "verify-resume",
        "Train a few steps twice, in one go and with stops, and compare bit for bit what is left: "
        "examples, losses, weights, optimizer, random streams. Evaluations are left out; nothing "
        "stays on the disk. Exit code 0: exact; 1: not.",
    )
    parser.add_argument("--steps", type=at_least(2), default=6, metavar="N", help="how many (6)")
    parser.add_argument(
        "--stops",
        type=lambda text: [positive(number) for number in text.split(",")],
        metavar="K,K",
        help="steps after which it is stopped (after a third and two thirds)",
    )
    args = parser.parse_intermixed_args(words)
    settings, cfg, _ = configuration(args)
    from peftcli import verify

    stops = args.stops or sorted({max(args.steps // 3, 1), max(2 * args.steps // 3, 1)})
    return verify.verify(settings, cfg, args.steps, stops, as_json=args.json)


def evaluate(words: list[str]) -> int:
    """Metrics on held-out examples."""
    parser = run_parser(
        "eval",
        "Measure a run folder's adapter on its held-out examples; without one, the base model.",
    )
    args = parser.parse_intermixed_args(words)
    settings, cfg, folder = configuration(args)
    from peftcli import run

    return run.evaluate(settings, cfg, folder, as_json=args.json)


def generate(words: list[str]) -> int:
    """Answers to prompts."""
    parser = run_parser(
        "generate", "Let a run folder's adapter answer; without --prompt and --file, in a chat."
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    given.add_argument(
        "--file",
        type=Path,
        help="prompts: .txt, one a line; .jsonl, {'prompt': ...} or {'messages': [...]}",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (128)"
    )
    args = parser.parse_intermixed_args(words)
    if args.prompt is None and args.file is None and not sys.stdin.isatty():
        raise ConfigError(
            "generate: a chat needs a terminal; otherwise give --prompt TEXT or --file FILE."
        )
    settings, cfg, folder = configuration(args)
    from peftcli import run

    return run.generate(
        settings,
        cfg,
        folder,
        prompt=args.prompt,
        file=args.file,
        max_new_tokens=args.max_new_tokens,
        as_json=args.json,
    )


def export(words: list[str]) -> int:
    """An adapter or a merged model for others."""
    parser = run_parser(
        "export",
        "Write a run folder's adapter, or its model with the adapter merged in, for other tools.",
    )
    parser.add_argument(
        "--to", choices=["adapter", "merged"], default="merged", help="what to write (merged)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder"
    )
    parser.add_argument(
        "--onto",
        choices=["dequantised", "original", "requantised"],
        help="of a run on quantised weights: those that it was trained on (dequantised), the "
        "original ones, or the merged ones quantised again",
    )
    parser.add_argument(
        "--half-reset",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="put a random half of every kind of tensor in every block back to the base's, to see "
        "how much comes back that training covered",
    )
    args = parser.parse_intermixed_args(words)
    settings, cfg, folder = configuration(args)
    from peftcli import run

    return run.export(
        settings,
        cfg,
        folder,
        to=args.to,
        output=args.output,
        onto=args.onto,
        half_reset=args.half_reset,
        as_json=args.json,
    )


def run_parser(verb: str, purpose: str) -> Parser:
    """What these verbs share."""
    parser = Parser(
        prog=f"peft-train {verb}",
        usage=f"peft-train {verb} [RUN_FOLDER] [+recipe=NAME] [group=choice] [key=value] [flags]",
        description=purpose,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_FOLDER, key=value",
        help="a run's folder, and what to change",
    )
    parser.add_argument(
        "-cd", "--config-dir", type=Path, help="a folder of your own with recipes/ and groups"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def configuration(args: argparse.Namespace) -> tuple[Run, DictConfig, Path | None]:
    """The run that the words mean: a folder's with changes, or one composed of them."""
    from peftcli import config

    dirs = [args.config_dir] if args.config_dir else []
    if args.words and is_run_folder(args.words[0]):
        folder = Path(args.words[0])
        cfg = config.load(folder, args.words[1:], dirs)
    else:
        folder, cfg = None, config.compose(args.words, dirs)
    return config.typed(cfg, dirs), cfg, folder


def is_run_folder(word: str) -> bool:
    """Whether a word is the folder of a run; another path is an error: nothing else looks so."""
    path = Path(word or "=")
    if (path / FILE).is_file():
        return True
    if path.is_dir():
        runs = [p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/{FILE}")]
        hint = f" The newest in it: {max(runs, key=lambda p: p.stat().st_mtime)}" if runs else ""
        raise ConfigError(f"{word}: is not a run folder, since it has no {FILE}.{hint}")
    if "/" in word and "=" not in word:
        near = (
            did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
            if path.parent.is_dir()
            else ""
        )
        raise ConfigError(f"{word}: no such run folder.{near}")
    return False


def at_least(least: int) -> Callable[[str], int]:
    """The reader of a whole number from `least`."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return read


positive = at_least(1)


# What `methods` chooses by, besides family, modality and format.
TRAITS = {
    "mergeable": "folds into the weights",
    "quantisable": "trains on a base of 4 or 8 bits",
    "pre-pass": "looks at the task before it trains",
}


# -- Results ---------------------------------------------------------------------------------------
def table(words: list[str]) -> int:
    """Numbers of many runs side by side."""
    from peftcli.tables import verbs

    return verbs.table(words)


def diff(words: list[str]) -> int:
    """Why two runs differ."""
    from peftcli.tables import verbs

    return verbs.diff(words)


def report(words: list[str]) -> int:
    """One HTML page about many runs."""
    from peftcli.tables import verbs

    return verbs.report(words)


def plot(words: list[str]) -> int:
    """Figures of many runs."""
    from peftcli.tables import verbs

    return verbs.plot(words)


# -- Documentation ---------------------------------------------------------------------------------
def methods(words: list[str]) -> int:
    """All methods, or one."""
    parser = Parser(
        prog="peft-train methods",
        description="All methods, or the equation and the options of one.",
    )
    parser.add_argument("name", nargs="?", help="a method")
    parser.add_argument("--family", help="low-rank, sparse, adapter, prompt, ...")
    parser.add_argument("--modality", choices=["text", "image"], help="works on such data")
    parser.add_argument("--exports", help="published as a type of peft (peft, LORA), model or own")
    for flag, meaning in TRAITS.items():
        parser.add_argument(
            f"--{flag}", action=argparse.BooleanOptionalAction, help=meaning, default=None
        )
    parser.add_argument("-cd", "--config-dir", type=Path, help="a folder of your own with method/")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    args = parser.parse_args(words)
    from peftcli.traits import Traits

    def wanted(traits: Traits) -> bool:
        marks = [getattr(args, flag.replace("-", "_")) for flag in TRAITS]
        have = (traits.mergeable, traits.quantisable, traits.pre_pass)
        return (
            args.family in (None, traits.family)
            and args.modality in (None, *traits.modalities)
            and (args.exports is None or args.exports.lower() in traits.exports.lower().split())
            and all(mark in (None, has) for mark, has in zip(marks, have, strict=True))
        )

    dirs = [args.config_dir] if args.config_dir else []
    if args.name is None and not args.json:
        from peftcli import catalog

        return catalog.methods(dirs, wanted)
    from peftcli import explain

    if args.name is None:
        return explain.methods_as_json(dirs, wanted)
    return explain.method(args.name, dirs, args.json)


def explain(words: list[str]) -> int:
    """A key, a group, a choice."""
    parser = Parser(
        prog="peft-train explain",
        description="What a key, a group or a choice means, takes, and defaults to.",
    )
    parser.add_argument(
        "key", nargs="?", help="such as trainer.max_grad_norm, dataset, method=lora, recipe"
    )
    parser.add_argument("-cd", "--config-dir", type=Path, help="a folder of your own with groups")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    args = parser.parse_args(words)
    from peftcli import explain

    return explain.explain(args.key, [args.config_dir] if args.config_dir else [], args.json)


def doctor(words: list[str]) -> int:
    """What is there and what is missing."""
    parser = Parser(
        prog="peft-train doctor", description="Versions, hardware, and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    args = parser.parse_args(words)
    from peftcli import doctor

    return doctor.doctor(args.json)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check": check,
    "verify-resume": verify_resume,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "table": table,
    "diff": diff,
    "report": report,
    "plot": plot,
    "methods": methods,
    "explain": explain,
    "doctor": doctor,
    "worker": worker,
    "sweep-worker": sweep_worker,
    "rank": rank,
}
