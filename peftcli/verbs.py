"""The verbs beside `train`: on a run folder or a configuration, and what they say of themselves.
What a verb needs is imported when it is called.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.arguments import Parser, at_least, configuration, positive, run_parser
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.traits import Traits

# What `methods` chooses by, besides family, modality and format.
TRAITS = {
    "mergeable": "folds into the weights",
    "quantisable": "trains on a base of few bits",
    "pre-pass": "looks at the task before it trains",
}


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
        "--to",
        choices=["adapter", "merged", "delta"],
        default="merged",
        help="what to write (merged); delta: each tensor of the merged model less the base's",
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
