"""Every method on one task: accuracy over seeds, best learning rate, size, step time, memory.

    python scripts/bench/methods.py [METHOD ...] [--recipe lora_minilm] [--set KEY=VALUE ...]
        [--out outputs/methods] [--workers 1] [--only accuracy|steps|table] [--rows 4x256]

Accuracy: one run for each rate of the method's grid, with the tuning seed and on another split of
the data, then the best rate with the test seeds; all methods see the same data in the same order
for the same number of steps. While the best rate is at an end of the grid, the grid grows there, to
five rates at most. A run that is there already is not run again, so the command can be stopped and
repeated. `--workers` shares the cores among methods.

Steps: optimizer steps of each method, of Hugging Face peft's same method at the same sizes where
it has one, and of LoRA in turn, each in a process of its own; the medians of their ratios, and the
most memory that a process held. Do not measure beside other work. A name may bring words of its
own, as `lora,method.dropout=0.05`. With `--rows` a step takes so many rows of so many random words,
every one a target, instead of the recipe's examples.

`--recipe` is a recipe with LoRA; the other methods replace it with their own defaults.
`--rates 1` skips the search and takes the middle rate, `--seeds` says which seeds are tested.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_step import smollm2
from race import Answer, Step, race, serve

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from peftcli.build import Parts

TUNING = ("seed=100", "dataset.seed=100")
GROWN = 5  # rates at most
CENTRE = {  # of the grid of rates, by family; methods whose scale is their own have theirs below
    "low-rank": 1e-3,
    "structured": 3e-3,
    "scale-shift": 3e-3,
    "selective": 3e-4,
    "sparse": 1e-3,
    "adapter": 1e-3,
    "prompt": 3e-3,
    "bridge": 1e-3,
}
OWN_CENTRE = {
    "adalora": 1e-2,
    "bitfit": 3e-3,
    "boft": 1e-2,
    "compacter": 3e-3,
    "fourierft": 3e-2,
    "full": 1e-4,
    "hut": 1e-2,
    "intrinsic_dimension": 3e-2,
    "mam": 1e-4,
    "parallel_adapter": 1e-4,
    "prefix_tuning": 1e-4,
    "prompt_tuning": 3e-2,
    "qwha": 1e-4,
    "vera": 1e-2,
}
ROUNDS, TOGETHER = 9, 2  # steps a method, and methods that stand beside LoRA
HF = "hf:"  # before the name of a method: Hugging Face peft's


def methods() -> dict[str, str]:
    """Every method by its file's name, with its family; the bridge needs a peft type to be one."""
    from peftcli import folders
    from peftcli.traits import family

    families = {m: family(target) for m, target in folders.targets("method").items()}
    return {m: kind for m, kind in families.items() if kind != "bridge"}


def bare(name: str) -> str:
    """The method of a name that may bring words of its own."""
    return name.split(",")[0]


def rate(method: str, family: str, place: int) -> float:
    """The rate `place` half decades from the centre, rounded to 1 or 3 times a power of ten."""
    centre = OWN_CENTRE.get(method, CENTRE.get(family, 1e-3))
    exponent = math.floor(2 * math.log10(centre) + 0.5) + place
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


# -- accuracy --------------------------------------------------------------------------------------
def run_all(method: str, family: str, args: argparse.Namespace) -> None:
    """All runs of one method in this process; their results lie in the run folders."""
    places = list(range(-(args.rates // 2), args.rates - args.rates // 2))
    if args.rates == 1:
        best = 0
    else:
        tuned: dict[int, float] = {}
        while True:
            for place in places:
                if place not in tuned:
                    lr = rate(method, family, place)
                    tuned[place] = once(method, lr, "tuning", [*args.set, *TUNING], args)
            best = max(places, key=lambda place: tuned[place])
            if len(places) >= GROWN or places[0] < best < places[-1]:
                break
            places = [places[0] - 1, *places] if best == places[0] else [*places, places[-1] + 1]
    for seed in args.seeds:
        once(method, rate(method, family, best), f"seed{seed}", [*args.set, f"seed={seed}"], args)


def once(method: str, lr: float, name: str, more: list[str], args: argparse.Namespace) -> float:
    """The accuracy of a run; 0 where it ended with an error, which is kept beside it."""
    from peftcli import config, run
    from peftcli.errors import Stopped, UserError

    folder = args.out / method / f"{name}_lr{lr:.0e}"
    words = [f"+recipe={args.recipe}", "method=" + method, f"optimizer.lr={lr}"]
    words += ["trainer.eval_on_start=false", f"trainer.num_threads={args.threads}", *more]
    if not (folder / "result.json").exists():
        try:
            cfg = config.compose([*words, f"run_dir={folder}"])
            run.train(config.typed(cfg), cfg)
        except Stopped:
            raise
        except UserError as e:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(str(e), encoding="utf-8")
            print(f"{method} lr={lr} {name}: {e}", file=sys.stderr)
            return 0.0
    return accuracy(json.loads((folder / "result.json").read_text(encoding="utf-8")))


def accuracy(result: dict[str, Any]) -> float:
    """After training, on the held-out examples."""
    return result["train_info"]["metrics"]["after"]["accuracy"]


# -- steps -----------------------------------------------------------------------------------------
def random_rows(rows: str) -> list[str]:
    """The words of a data set of so many rows of so many tokens, such as 4x256."""
    from transformers import AutoTokenizer

    batch, length = map(int, rows.split("x"))
    vocabulary = AutoTokenizer.from_pretrained(smollm2()).get_vocab()
    words = sorted(w[1:] for w in vocabulary if w[0] == "Ġ" and w[1:].isascii() and w[1:].islower())
    draw = random.Random(0)
    texts = [" " + " ".join(draw.choices(words, k=length)) for _ in range(2 * batch)]
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return [
        *("dataset=file", f"dataset.path={path}", "dataset.format=text", "dataset.eval_samples=1"),
        f"trainer.per_device_train_batch_size={batch}",
    ]


def make_step(method: str, family: str, args: argparse.Namespace) -> Step:
    """An optimizer step of the method, over the same examples each time."""
    from peftcli import run
    from peftcli.screen import LiveScreen
    from peftcli.train.folder import RunFolder
    from peftcli.train.signals import Stopper

    parts, cfg = adapted(method, family, args, [])
    folder = RunFolder(Path(tempfile.mkdtemp()))
    loop = run.make_loop(parts, cfg, folder, LiveScreen(), Stopper())
    loop.log = loop.open_log(loop.progress)
    assert parts.data is not None
    examples = [parts.data.train[i] for i in range(loop.plan.batch)]
    parts.model.train()

    return lambda: loop.step(examples)


def make_hf_step(method: str, family: str, args: argparse.Namespace) -> Step:
    """The step of peft's method, on the same examples, padded, on the base as transformers has it:
    its adapter is read from ours.
    """
    import torch
    from peft import PeftModel

    from peftcli.build import build, training_collator
    from peftcli.export import publish
    from peftcli.train import objective

    stock = ["dataset.packing=false", "trainer.kernels=reference"]
    parts, _ = adapted(method, family, args, stock)
    parts.run.method.finish(parts.host)
    folder = Path(tempfile.mkdtemp()) / "adapter"
    publish.publish(parts, folder, {})
    plain, trainer = build(parts.run), parts.run.trainer
    assert plain.data is not None
    model = PeftModel.from_pretrained(plain.model, folder, is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    size, collate = trainer.per_device_train_batch_size, training_collator(plain)
    rows = [plain.data.train[i] for i in range(size * trainer.gradient_accumulation_steps)]
    batches = [collate(rows[i : i + size]).to(plain.device) for i in range(0, len(rows), size)]
    totals = objective.Totals.of(batches)
    has_plain_head = plain.autocast is not None and plain.task != "causal_lm"  # in float32

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in batches:
            with torch.autocast(plain.device.type, plain.autocast, enabled=has_plain_head):
                part = objective.loss(plain.task, "cross_entropy", model, batch, totals, None)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def adapted(
    method: str, family: str, args: argparse.Namespace, more: list[str]
) -> tuple[Parts, DictConfig]:
    """The parts of a run with the method on them, and its configuration."""
    from peftcli import config
    from peftcli.build import adapt, build

    name, *own = method.split(",")
    words = [f"+recipe={args.recipe}", f"method={name}", *args.set, *own, *more]
    words += [f"optimizer.lr={rate(name, family, 0)}", f"trainer.num_threads={args.threads}"]
    cfg = config.compose([*words, f"run_dir={tempfile.mkdtemp()}"])
    parts = build(config.typed(cfg))
    adapt(parts)
    return parts, cfg


def race_all(chosen: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each method its steps' time by LoRA's, and by peft's where it has the method, and its
    memory (bytes).
    """
    measured = {}
    names = [name for name in chosen if name != "lora"]
    for start in range(0, len(names), TOGETHER):
        group = ["lora", *names[start : start + TOGETHER]]
        racing = [*group, *(HF + name for name in group)]
        answers = race({name: command("--serve", name, args) for name in racing}, ROUNDS, group)
        for name in group:
            if answers[name]:
                measured[name] = {
                    "step": ratio(answers[name], answers["lora"]),
                    "hf": ratio(answers[name], answers[HF + name]),
                    "peak": answers[name][-1]["peak"],
                }
    return measured


def ratio(mine: list[Answer], theirs: list[Answer]) -> float | None:
    """The median of the rounds' ratios; None where one of them failed."""
    pairs = zip(mine, theirs, strict=False)
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    return statistics.median(ratios) if ratios else None


def command(verb: str, method: str, args: argparse.Namespace) -> list[str]:
    """This script, as the worker of one method."""
    words = [sys.executable, __file__, verb, method, "--recipe", args.recipe]
    words += ["--out", str(args.out), "--rates", str(args.rates), "--threads", str(args.threads)]
    words += ["--seeds", *map(str, args.seeds)]
    return [*words, *(["--set", *args.set] if args.set else [])]


# -- the table -------------------------------------------------------------------------------------
def rows(out: Path) -> list[dict[str, Any]]:
    """One row a method from what was run and measured."""
    measured = json.loads(steps.read_text()) if (steps := out / "steps.json").exists() else {}
    table = []
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        test = [json.loads(p.read_text()) for p in folder.glob("seed*/result.json")]
        if not test:
            continue
        values = [accuracy(r) for r in test]
        rates = test[0]["run_info"]["train_config"]["optimizer"]
        table.append(
            {
                "method": folder.name,
                "accuracy": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "lr": rates["lr"],
                "head_lr": rates.get("head_lr"),
                "tried": len({p.name for p in folder.glob("tuning*")}),
                "trained": test[0]["train_info"]["num_trainable_params"],
                **measured.get(folder.name, {"step": None, "hf": None, "peak": None}),
            }
        )
    return sorted(table, key=lambda row: -row["accuracy"])


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, best first."""
    lines = [
        "| method | accuracy, % | rate | rates tried | trainable | step / LoRA's | step / peft's | "
        "peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table:
        spread = "" if r["deviation"] is None else f" ± {100 * r['deviation']:.1f}"
        step, hf = ("" if r[k] is None else f"{r[k]:.2f}" for k in ("step", "hf"))
        head = "" if r["head_lr"] is None else f", head {r['head_lr']:.0e}"
        peak = "" if r["peak"] is None else f"{r['peak'] / 2**20:,.0f} MiB"
        lines.append(
            f"| `{r['method']}` | {100 * r['accuracy']:.1f}{spread} | {r['lr']:.0e}{head} "
            f"| {r['tried']} | {r['trained']:,} | {step} | {hf} | {peak} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run and measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--recipe", default="lora_minilm")
    parser.add_argument("--out", type=Path, default=Path("outputs/methods"))
    parser.add_argument("--set", nargs="*", default=[], help="further overrides for every run")
    parser.add_argument("--rates", type=int, default=3)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=["accuracy", "steps", "table"])
    parser.add_argument("--rows", help="of a step, such as 4x256; the recipe's examples by default")
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:  # workers are handed its words
        args.set += random_rows(args.rows)
    known = methods()
    if args.run:
        return run_all(args.run, known[args.run], args)
    if args.serve:
        name = args.serve.removeprefix(HF)
        make = make_hf_step if name != args.serve else make_step
        return serve(lambda: make(name, known[bare(name)], args))
    if unknown := [name for name in args.methods if bare(name) not in known]:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: known[bare(name)] for name in args.methods or known}
    cores = len(os.sched_getaffinity(0))
    if args.only in (None, "accuracy"):
        args.threads = max(1, cores // args.workers)
        with ThreadPoolExecutor(args.workers) as pool:
            codes = pool.map(lambda name: subprocess.call(command("--run", name, args)), chosen)
        for name, code in zip(chosen, codes, strict=True):
            if code:
                print(f"{name}: exit code {code}", file=sys.stderr)
    if args.only in (None, "steps"):
        args.threads, steps = cores, args.out / "steps.json"
        args.out.mkdir(parents=True, exist_ok=True)
        before = json.loads(steps.read_text()) if steps.exists() else {}
        steps.write_text(json.dumps(before | race_all(chosen, args), indent=2))
    print(markdown(rows(args.out)))
    return None


if __name__ == "__main__":
    main()
