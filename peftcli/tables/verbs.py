"""The verbs on results: what their words mean, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftcli.cli import Parser
from peftcli.tables import paper
from peftcli.tables.render import FORMATS, write
from peftcli.tables.runs import read_runs
from peftcli.tables.table import Asked, make_table


def table(words: list[str]) -> int:
    """Numbers of many runs side by side; with +table=NAME, a published table beside them."""
    if any(paper.is_name(word) for word in words):
        return published(words)
    parser = Parser(
        prog="peft-train table",
        description="The table of a paper from run folders, sweep folders, or folders above them.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders")
    add_asked(parser)
    parser.add_argument("--format", choices=FORMATS, help="rich, or what --output ends in")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a file instead of the screen")
    args = parser.parse_args(words)
    write(make_table(read_runs(args.runs), asked(args)), args.format, args.output)
    return 0


def published(words: list[str]) -> int:
    """What a paper printed beside what is counted and measured here."""
    parser = Parser(
        prog="peft-train table",
        usage="peft-train table +table=NAME [RUNS ...] [key=value ...] [flags]",
        description="A published table: printed numbers beside parameters counted here and scores "
        "of runs that were started by its cells' words (peft-train -m +table=NAME). "
        "+table alone lists the tables.",
    )
    parser.add_argument("words", nargs="+", metavar="+table=NAME, RUNS, key=value")
    parser.add_argument("-cd", "--config-dir", type=Path, help="a folder of your own with table/")
    parser.add_argument("--format", choices=FORMATS, help="rich, or what --output ends in")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a file instead of the screen")
    args = parser.parse_intermixed_args(words)
    dirs = [args.config_dir] if args.config_dir else []
    asked, rest = paper.asked_of(args.words)
    if not asked.name:
        write(paper.listed(dirs), args.format, args.output)
        return 0
    from peftcli.tables import printed

    runs = read_runs([Path(word) for word in rest if "=" not in word])
    extra = [word for word in rest if "=" in word]
    wide = (args.format or (args.output.suffix[1:] if args.output else "")) in ("csv", "json")
    made = printed.make_table(asked, runs, extra, dirs, wide=wide)
    write(made, args.format, args.output)
    return 0


def add_asked(parser: Parser) -> None:
    """The options that say which table."""
    parser.add_argument(
        "--rows", type=words_of, default=("method",), metavar="KEY,...", help="(method)"
    )
    parser.add_argument(
        "--columns", type=words_of, default=(), metavar="KEY,...", help="e.g. dataset, model"
    )
    parser.add_argument("--metric", help="e.g. accuracy; by default what tells the runs' best step")
    parser.add_argument(
        "--aggregate", choices=["mean", "iqm"], default="mean", help="iqm: of the middle half"
    )
    parser.add_argument("--paired", metavar="ROW", help="compare with this row on equal seeds")
    parser.add_argument(
        "--tuning-seeds", type=seeds, default=(), metavar="N,...", help="these only choose values"
    )
    parser.add_argument(
        "--test-seeds", type=seeds, default=(), metavar="N,...", help="only these are reported"
    )
    parser.add_argument(
        "--show-differences",
        action="store_true",
        help="where protocols differ (data, prompt, versions, ...), show the differences as columns"
        " instead of refusing",
    )


def asked(args: argparse.Namespace) -> Asked:
    """The table that the options say."""
    return Asked(
        rows=args.rows,
        columns=args.columns,
        metric=args.metric,
        how=args.aggregate,
        paired=args.paired,
        tuning_seeds=args.tuning_seeds,
        test_seeds=args.test_seeds,
        show_differences=args.show_differences,
    )


def words_of(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def seeds(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    if not all(word.isdigit() for word in words_of(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers between commas")
    return tuple(map(int, words_of(text)))
