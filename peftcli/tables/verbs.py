"""The verbs on results: what their words mean, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.arguments import Parser

if TYPE_CHECKING:
    from peftcli.tables.cells import Plan
    from peftcli.tables.runs import RunRecord
    from peftcli.tables.table import Table

FORMATS = ("rich", "markdown", "csv", "latex", "json")


def table(words: list[str]) -> int:
    """Numbers of many runs side by side; with +table=NAME, a published table beside them."""
    if any(word.startswith("+table") for word in words):
        return published(words)
    parser = Parser(
        prog="peft-train table",
        description="The table of a paper from run folders, sweep folders, or folders above them.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders")
    add_asked(parser)
    parser.add_argument(
        "--show", type=words_of, default=(), metavar="COLUMN,...", help="only these, in this order"
    )
    parser.add_argument("--format", choices=FORMATS, help="rich, or what --output ends in")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a file instead of the screen")
    args = parser.parse_args(words)
    from peftcli.tables.render import selected, write

    _, _, table = found(args)
    write(selected(table, args.show), args.format, args.output)
    return 0


def diff(words: list[str]) -> int:
    """Why two runs differ."""
    parser = Parser(
        prog="peft-train diff",
        description="Why two runs have different numbers: keys, data, versions, hardware, and the "
        "first step where they part.",
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="a run folder")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="another")
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")
    args = parser.parse_args(words)
    from peftcli.tables import diff
    from peftcli.tables.runs import read_run

    a, b = (read_run(path) for path in (args.run_a, args.run_b))
    diff.show(a, b, diff.compare(a, b), args.json)
    return 0


def report(words: list[str]) -> int:
    """One HTML page."""
    parser = Parser(
        prog="peft-train report",
        description="One HTML page from many runs: the table, curves, costs, and the keys in which "
        "runs differ. It needs no network.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="report.html")
    add_asked(parser)
    args = parser.parse_args(words)
    from peftcli.tables.render import save
    from peftcli.tables.report import page

    runs, plan, table = found(args)
    save(args.output, page(runs, table, plan))
    print(args.output)
    return 0


def plot(words: list[str]) -> int:
    """Figures."""
    parser = Parser(
        prog="peft-train plot",
        description="Figures from many runs as PNG and SVG: loss and metrics by step; the metric "
        "by learning rate, parameters, memory and time, with the Pareto front.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the figures")
    add_asked(parser)
    args = parser.parse_args(words)
    from peftcli.tables.plots import write_plots

    runs, plan, table = found(args)
    for path in write_plots(runs, table, plan, args.output):
        print(path)
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
    from peftcli.tables import paper
    from peftcli.tables.render import write
    from peftcli.tables.runs import read_runs

    dirs = [args.config_dir] if args.config_dir else []
    asked, rest = paper.asked_of(args.words)
    if not asked.name:
        write(paper.listed(dirs), args.format, args.output)
        return 0
    of = asked.of(paper.read(asked.name, dirs))
    runs = read_runs([Path(word) for word in rest if "=" not in word])
    extra = [word for word in rest if "=" in word]
    wide = (args.format or (args.output.suffix[1:] if args.output else "")) in ("csv", "json")
    from peftcli.tables import printed  # which counts parameters: torch

    made = printed.make_table(asked.name, of, runs, extra, dirs, wide=wide)
    write(made, args.format, args.output)
    return 0


def add_asked(parser: Parser) -> None:
    """The options that say which table."""
    parser.add_argument(
        "--rows",
        type=words_of,
        default=("method",),
        metavar="KEY,...",
        help="what a row is (method)",
    )
    parser.add_argument(
        "--columns", type=words_of, default=(), metavar="KEY,...", help="e.g. dataset or model"
    )
    parser.add_argument("--metric", help="by default the one that tells the runs' best step")
    parser.add_argument(
        "--aggregate",
        choices=["mean", "iqm"],
        default="mean",
        help="of seeds (mean); iqm: the mean of their middle half",
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


def found(args: argparse.Namespace) -> tuple[list[RunRecord], Plan, Table]:
    """The runs, and the table of them that the options say."""
    from peftcli.tables.runs import read_runs
    from peftcli.tables.table import Asked, plan_of, table_of

    asked = Asked(
        rows=args.rows,
        columns=args.columns,
        metric=args.metric,
        how=args.aggregate,
        paired=args.paired,
        tuning_seeds=args.tuning_seeds,
        test_seeds=args.test_seeds,
        show_differences=args.show_differences,
    )
    runs = read_runs(args.runs)
    plan = plan_of(runs, asked)
    return runs, plan, table_of(runs, plan, args.paired)


def words_of(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def seeds(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    if not all(word.isdigit() for word in words_of(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers between commas")
    return tuple(map(int, words_of(text)))
