"""The typed configuration: one frozen dataclass a group (methods have theirs in
`peftcli/methods/`).

Every file in `configs/<group>/` equals the defaults of its dataclass but for what the file is
about; the composed configuration is checked against these types before anything is loaded. This
file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Offload = Literal["none", "optimizer", "parameters"]
Loss = Literal["cross_entropy", "tfew"]
Kernels = Literal["auto", "reference", "require"]
Task = Literal["causal_lm", "seq2seq", "classification", "regression", "image_classification"]
LABELLED: tuple[Task, ...] = ("classification", "image_classification")  # choose among classes
Format = Literal[
    "auto",
    "chat",
    "instruct",
    "prompt_completion",
    "text",
    "classification",
    "regression",
    "image_classification",
]


@dataclass(frozen=True)
class Model:
    """Which weights, and in what form."""

    name_or_path: str  # folder | hub id | package:NAME (an installed package that ships weights)
    revision: str | None = None  # branch, tag or commit of a hub id
    tokenizer: str | None = None  # folder or hub id, where it is not the model's own
    chat_template: str | None = (
        None  # file with a Jinja template, where the tokenizer's own is missing or unwanted
    )
    task: Literal["auto"] | Task = "auto"  # auto: from dataset.format and the architecture
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # of frozen weights; auto: bfloat16 under bf16
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False  # runs code from the hub; needs `revision` pinned to a commit
    architecture: dict[str, Any] = field(
        default_factory=dict
    )  # dimensions by transformers' names, by which `check` counts where there are no weights


@dataclass(frozen=True)
class Source:
    """One part of a mixture. What is None here is taken from the `dataset` group."""

    path: str
    weight: Annotated[float, Gt(0.0)] = 1.0  # relative number of examples drawn from it
    format: Format = "auto"
    name: str | None = None
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Which examples, how they read, and how they are laid out."""

    path: str | None = (
        None  # embedded name | file (.json .jsonl .csv .parquet, also .gz) | folder | hub id
    )
    mixture: tuple[Source, ...] = ()  # instead of `path`: several sources with weights
    name: str | None = None  # subset of a hub data set
    revision: str | None = None  # branch, tag or commit of a hub data set
    split: str = "train"  # split of a hub data set or a saved folder
    format: Format = "auto"  # auto: from the columns
    columns: dict[str, str] = field(default_factory=dict)  # our column: the file's column
    system: str | None = None  # system message put before chats that have none
    prompt: str | None = None  # template of the user's turn or of the prompt, e.g. "Review: {text}"
    choices: tuple[str, ...] | None = None  # answers to choose between at evaluation
    train_on: Literal["completion", "all", "last"] = "completion"  # which tokens are targets
    train_samples: Positive | None = None  # use only so many, drawn by the split's hash order
    eval_path: str | None = None  # held-out examples; None: a part of `path`
    eval_split: str | None = None  # held-out split of the same hub data set or folder
    eval_fraction: Annotated[float, Ge(0.0), Lt(1.0)] = (
        0.05  # part of `path` held out, where no eval_path is given
    )
    eval_samples: Annotated[int, Ge(0)] | None = None  # this many held out instead
    eval_part: Literal["all", "tuning", "report"] = (
        "all"  # of what is held out, one of two fixed halves: to choose by, or to report
    )
    seed: int = 0  # of the split and of the mixture; not of the run
    max_length: Positive = 1024  # tokens of one example
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    packing: Literal["auto"] | bool = (
        "auto"  # lay a batch in one row without padding; auto: where the model allows
    )
    group_by_length: bool = False  # batches of similar length, where rows are padded
    num_proc: Positive = 1  # processes that tokenise


@dataclass(frozen=True)
class Trainer:
    """How long, in what portions, how precisely; what is evaluated and kept."""

    max_steps: Positive | None = None  # optimizer steps; wins over num_train_epochs
    num_train_epochs: Annotated[float, Gt(0.0)] = 1.0
    loss: Loss = "cross_entropy"  # tfew: of the right answer, against wrong ones, among all choices
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive = 16
    gradient_accumulation_steps: Positive = 1
    max_grad_norm: Annotated[float, Gt(0.0)] | None = 1.0  # None: no clipping
    bf16: Literal["auto"] | bool = (
        "auto"  # auto: where the processor multiplies bfloat16 in hardware
    )
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    eval_steps: Positive | None = (
        None  # optimizer steps between evaluations; None: only before and after
    )
    eval_on_start: bool = True
    generate_samples: Annotated[int, Ge(0)] = (
        0  # eval prompts answered freely, for exact match and for stopping
    )
    save_steps: Positive | None = (
        None  # optimizer steps between checkpoints; None: on signals and at the end
    )
    save_total_limit: Positive = 2  # newest checkpoints kept, beside the best
    keep_bytes: Positive | None = (
        None  # bytes that checkpoints may take together; the newest and the best stay in any case
    )
    rehearse: bool = True  # save and publish after the first step, and remove it, to fail early
    longest_first: bool = True  # compute the longest micro-batch once before the first step
    metric_for_best: str = "auto"  # auto: accuracy, pearson or loss, by the task
    logging_steps: Positive = 1
    nonfinite_patience: Positive = 3  # steps in a row with non-finite numbers before the run stops
    stop_after: Annotated[float, Gt(0.0)] | None = (
        None  # seconds of one start, after which the run saves and stops as by a signal
    )
    num_threads: Positive | None = None  # CPU threads; None: the process's share of the cores
    compile: bool = False  # transformer blocks through torch.compile
    kernels: Kernels = (
        "auto"  # GPU kernels where they run; reference: plain torch; require: or stop
    )


@dataclass(frozen=True)
class Scheduler:
    """Learning rate over optimizer steps; names and arguments are those of transformers."""

    name: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    warmup_ratio: Fraction = 0.0  # part of all steps
    warmup_steps: Annotated[int, Ge(0)] | None = None  # wins over warmup_ratio
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of that schedule


@dataclass(frozen=True)
class Quantization:
    """Storage of frozen weights. The adapters stay in float32."""

    name: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: bool = True  # 4 bits: the blocks' scales are quantised, too
    threshold: Annotated[float, Ge(0.0)] = 6.0  # int8: larger inputs are multiplied in 16 bits
    skip_modules: tuple[str, ...] = ()  # linears that stay in model.dtype


@dataclass(frozen=True)
class Strategy:
    """How the work is spread over processes."""

    name: Literal["single", "ddp"] = "single"


@dataclass(frozen=True)
class FSDP(Strategy):
    """Weights of the base are cut up, with the optimizer state of those that train."""

    name: Literal["fsdp"] = "fsdp"  # pyright: ignore[reportIncompatibleVariableOverride]
    offload: Offload = "none"  # to the memory of the CPU


@dataclass(frozen=True)
class DeepSpeed(Strategy):
    """ZeRO: gradients and optimizer state of what trains are divided, and weights in stage 3."""

    name: Literal["deepspeed"] = "deepspeed"  # pyright: ignore[reportIncompatibleVariableOverride]
    zero_stage: Literal[1, 2, 3] = 3
    offload: Offload = "none"  # to the memory of the CPU
    config: str | None = None  # a DeepSpeed JSON file of your own, checked against the other keys


@dataclass(frozen=True)
class Launch:
    """Which processes a strategy other than `single` is started in, and how they find each other.

    Under torchrun, accelerate or another launcher, which sets RANK and WORLD_SIZE, none is started.
    """

    num_processes: Literal["auto"] | Positive = (
        "auto"  # on this node; auto: one a GPU, without GPUs one
    )
    nnodes: Positive = 1
    node_rank: Annotated[int, Ge(0)] = 0  # of this node; node 0 holds the run folder
    rdzv_endpoint: str | None = None  # HOST:PORT of node 0, for several nodes
    rdzv_backend: Literal["static", "c10d"] = "static"
    timeout: Annotated[float, Gt(0.0)] = 1800.0  # seconds that a rank waits for the others
    max_restarts: Annotated[int, Ge(0)] = 0  # after a rank was killed or broke down


@dataclass(frozen=True)
class Logger:
    """Where metrics go besides metrics.jsonl, which is always written."""

    name: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"
    project: str = "peftcli"  # wandb
    mode: Literal["online", "offline"] = (
        "offline"  # wandb; offline runs are sent later by `wandb sync`
    )


OPTIMIZERS = ("torch.optim.", "bitsandbytes.optim.", "transformers.optimization.")  # of libraries


@dataclass(frozen=True)
class Optimizer:
    """A torch optimizer by its class, with its own keyword arguments beside `lr` and
    `weight_decay`.
    """

    cls: str  # dotted name under an allowed package, from the file's `_target_`
    lr: Annotated[float, Gt(0.0)]
    weight_decay: Annotated[float, Ge(0.0)] = 0.0
    head_lr: Annotated[float, Gt(0.0)] | None = None  # of modules trained whole; None: `lr`
    kwargs: dict[str, Any] = field(default_factory=dict)  # the rest of the file's keys


@dataclass(frozen=True)
class Run:
    """One whole run: what `config.yaml` in a run folder holds, typed."""

    name: str
    run_dir: str
    seed: int
    resume: str  # auto | never | a checkpoint's folder
    model: Model
    method: Any  # a `peftcli.core.method.Method`, by its file's `_target_`
    quantization: Quantization
    dataset: Dataset
    trainer: Trainer
    optimizer: Optimizer
    scheduler: Scheduler
    strategy: Strategy
    launch: Launch
    logger: Logger


@dataclass(frozen=True)
class Sweep:
    """How the members of a sweep (`-m`) are run, and which are tried, counted and stopped."""

    jobs: Literal["auto"] | Positive = (
        "auto"  # members at once on this machine; auto: one a GPU, or one
    )
    timeout: Annotated[float, Gt(0.0)] | None = (
        None  # seconds that one start of a member may take; None: any
    )
    max_failures: Positive | None = None  # once so many have failed no member is started; None: any
    stale_after: Annotated[float, Ge(2.0)] = (
        120.0  # seconds without a sign after which a process on another machine counts as dead
    )
    launcher: Literal["local", "joblib", "ray", "submitit"] = (
        "local"  # who starts the processes that work on the sweep; local: this one works
    )
    workers: Positive = 1  # processes that another launcher starts, each with its own `jobs`
    launcher_options: dict[str, Any] = field(default_factory=dict)  # arguments of that launcher
    search: Literal["grid", "random", "optuna", "de", "metade"] = (
        "grid"  # optuna: its TPE; de: differential evolution; metade: MetaDE on a surrogate
    )
    trials: Positive | None = None  # settings tried of each `compare`; None: all, or 20 of no end
    search_seed: int = 0  # of what is drawn
    metric: str | tuple[str, ...] = "auto"  # auto: accuracy, pearson or loss; several: a front
    direction: Literal["auto", "maximize", "minimize"] = "auto"  # auto: as the metric is known
    compare: tuple[str, ...] = (
        "recipe",
        "method",
        "model",
        "dataset",
        "quantization",
    )  # swept keys whose values are tuned apart, with equal budgets
    tuning_seeds: tuple[int, ...] = ()  # a setting counts by its mean over these
    test_seeds: tuple[int, ...] = ()  # the best setting is run on these, and reported
    report_on: dict[str, Any] = field(
        default_factory=dict
    )  # keys of runs on test seeds: other data
    seed_order: Literal["all", "rungs", "race"] = (
        "all"  # rungs: 1 seed, 3 for the better half, 5 for its; race: until 2 errors behind
    )
    budget_seconds: Annotated[float, Gt(0.0)] | None = None  # of runs, for each `compare`
    budget_tokens: Annotated[float, Gt(0.0)] | None = None  # trained on, for each `compare`
    lr_scale: dict[str, Annotated[float, Gt(0.0)]] = field(
        default_factory=dict
    )  # method or its family: factor on the optimizer.lr that is swept
    prune: Literal["none", "median", "predict"] = "none"  # stop runs that will not be the best
    prune_model: Literal["ols", "svr"] = "ols"  # of predict: least squares, or a nu-SVR (sklearn)
    prune_after: Positive = 5  # finished runs before any is stopped; predict: 20 at least
    prune_from: Fraction = 0.2  # part of a run's steps before it may be stopped
    match_parameters: str | None = (
        None  # 300k or 0.3%: every method at the size that trains so many
    )


@dataclass(frozen=True)
class Command(Run):
    """What a line composes: a run, and what it says of a sweep, which no run's configuration
    holds.
    """

    sweep_dir: str
    sweep: Sweep
