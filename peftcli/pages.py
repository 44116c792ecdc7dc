"""The pages that `peft-train --help` and `peft-train train --help` print."""

from __future__ import annotations

import sys

from peftcli import folders

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
  sweep.search=KIND   with -m: random, optuna, de or metade; `peft-train explain sweep` tells more
  +table=NAME         with -m: the runs of a published table; `peft-train table +table` lists them
  -cd, --config-dir   a folder of your own with recipes/ and groups; what it holds wins over ours
  -cn, --config-name  a primary file other than config.yaml
  --cfg job|hydra|all [--resolve] [-p PACKAGE]    print the configuration and stop
  --info [all|config|defaults|defaults-tree|plugins|searchpath]
  -sc install=bash    tab completion          --hydra-help    Hydra's own page
"""


def page(text: str) -> str:
    """A help page; *words* are bold on a terminal."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for i in range(text.count("*")):
        text = text.replace("*", (bold, plain)[i % 2], 1)
    for kind in ("recipes", "configs"):
        text = text.replace(f"{{{kind}}}", folders.shown(folders.built_in(kind)))
    return text.rstrip()
