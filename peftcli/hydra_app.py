"""Everything that touches Hydra, its internals included: search path, composing, running.

Hydra's own entry point prints its errors and exits; here they are raised, in our words. Tested with
hydra-core 1.3.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job, setup_globals
from hydra.plugins.completion_plugin import CompletionPlugin
from hydra.plugins.config_source import ConfigResult
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from peftcli import cards, folders
from peftcli.errors import ConfigError
from peftcli.hydra_words import VERBS, known_keys, our_words, unknown_flag

OF_CLASSES = ("method", "optimizer")  # groups whose choices are classes with keys of their own
Task = Callable[[DictConfig, Path], int]  # the configuration and its run folder -> exit code
RUN_VERBS = VERBS[:6]  # those that take overrides


class TaskFailed(Exception):  # noqa: N818 - an envelope
    """Carries an exception of the task past the translation of Hydra's own."""

    def __init__(self, content: Exception) -> None:
        super().__init__(str(content))
        self.content = content


class RecipeFolder(FileConfigSource):
    """A folder of recipes as the group `recipe`: `+recipe=NAME` is NAME.yaml in it."""

    @staticmethod
    def scheme() -> str:
        """`recipes://FOLDER` in a search path."""
        return "recipes"

    def is_group(self, config_path: str) -> bool:
        """Whether it is the group, or a folder in it."""
        inside = _inside(config_path)
        return config_path == "" or (inside is not None and super().is_group(inside))

    def is_config(self, config_path: str) -> bool:
        """Whether it is a recipe."""
        inside = _inside(config_path)
        return bool(inside) and super().is_config(inside)

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a recipe."""
        return super().load_config(_inside(config_path) or "")

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The recipes of a folder, or the one group at the top."""
        inside = _inside(config_path)
        if inside is None:
            return ["recipe"] if results_filter != ObjectType.CONFIG else []
        files: list[str] = []
        for file in os.listdir(Path(self.path, inside)):
            self._list_add_result(files, f"{config_path}/{file}", file, results_filter)
        return sorted(set(files))


def _inside(config_path: str) -> str | None:
    """The path below the group `recipe`; None outside of it."""
    head, _, rest = config_path.partition("/")
    return rest if head == "recipe" else None


class Loader(ConfigLoaderImpl):
    """Hydra's, but a recipe's keys of `method` and `optimizer` belong to its own choice of them.

    Under another choice (`+recipe=lora_llama method=full`) they would mean something else or
    nothing, so that one's own defaults hold.
    """

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        chosen = {d.override_key: (d.config_path or "").rpartition("/")[2] for d in defaults}
        own: dict[str, Any] = dict(cards.defaults())
        for path in [
            d.config_path for d in defaults if (d.config_path or "").startswith("recipe/")
        ]:
            recipe = repo.load_config(str(path))  # this composition's own copy
            assert recipe is not None
            named = [
                d for d in recipe.defaults_list or () if isinstance(d, GroupDefault) and d.override
            ]
            own |= {str(d.group).lstrip("/"): d.value for d in named}
            for group in OF_CLASSES:
                if isinstance(recipe.config, DictConfig) and own[group] != chosen.get(group):
                    recipe.config.pop(group, None)
        composed = super()._compose_config_from_defaults_list(defaults, repo)
        _refuse_code(composed)
        return composed


def _refuse_code(composed: DictConfig) -> None:
    """Raise `ConfigError` where files would have Hydra run code: anybody may have written them."""
    for key in ("hydra.callbacks", "hydra.job.env_set"):
        if OmegaConf.select(composed, key):
            raise ConfigError(
                f"{key}: refused in files, since it can run any code. If you want it, say so on "
                f"the command line: '++{key}={{...}}'."
            )


def open_hydra(config_dirs: Sequence[Path]) -> Hydra:
    """Hydra over our folders and the user's; theirs come first."""
    version.setbase("1.3")
    Plugins.instance().register(RecipeFolder)
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    for folder in config_dirs:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder.")
        path.append("command-line", f"file://{folder.absolute()}")
    path.append("main", f"file://{folders.built_in('configs')}")
    for folder in folders.recipe_folders(config_dirs):
        if folder.name == "recipes":  # a user's `recipe/` is a group as it is
            path.append("recipes", f"recipes://{folder.absolute()}")
    path.append("schema", "structured://")
    return Hydra(task_name="train", config_loader=Loader(path))


def compose(
    overrides: Sequence[str], config_dirs: Sequence[Path] = (), name: str = cards.ROOT
) -> DictConfig:
    """What `overrides` make of the primary file: interpolations kept, Hydra's own part left out."""
    refuse_sweep_words(overrides)
    with our_words(overrides, config_dirs):
        setup_globals()
        cfg = open_hydra(config_dirs).compose_config(
            config_name=name, overrides=normalised(overrides, config_dirs), run_mode=RunMode.RUN
        )
        return own_part(cfg)


def override(
    cfg: DictConfig, overrides: Sequence[str], config_dirs: Sequence[Path] = ()
) -> DictConfig:
    """Put values and whole groups (`dataset=tweets`) over a configuration that exists."""
    refuse_sweep_words(overrides)
    with our_words(overrides, config_dirs, cfg):
        setup_globals()
        hydra = open_hydra(config_dirs)
        parsed = OverridesParser.create().parse_overrides(list(normalised(overrides, config_dirs)))
        groups = [o for o in parsed if hydra.config_loader.get_group_options(o.key_or_group)]
        if recipe := next((o for o in groups if o.key_or_group == "recipe"), None):
            raise ConfigError(
                f"{recipe.input_line}: a recipe is a whole run and cannot be put over a run folder."
            )
        if groups:
            lines = [str(o.input_line) for o in groups]
            fresh = own_part(
                hydra.compose_config(config_name=cards.ROOT, overrides=lines, run_mode=RunMode.RUN)
            )
            for group in groups:
                cfg[group.key_or_group] = fresh[group.key_or_group]
        OmegaConf.set_struct(cfg, True)
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in groups], cfg)
        return cfg


def normalised(overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    """Accept `recipe=NAME`, and new entries of mappings (`scheduler.kwargs.x=1` or
    `scheduler.kwargs={x: 1}`), without a `+`.
    """
    result = []
    for line in overrides:
        if line.startswith("recipe="):
            line = f"+{line}"
        elif match := re.match(r"(\w+\.\w+)(\.[^=]+=|=\s*\{)", line):
            files = cards.all_keys(config_dirs).get(match[1], [])
            if any(key.takes.startswith("a mapping to") for _, key in files):
                line = f"++{line}"
        result.append(line)
    return result


def put_over(cfg: DictConfig, values: Sequence[Override]) -> None:
    """Set keys of a composed configuration, which then is as if it was composed with them, but for
    `hydra.job.override_dirname`.
    """
    ConfigLoaderImpl._apply_overrides_to_config(list(values), cfg)
    cfg.hydra.overrides.task.extend([o.input_line for o in values])


def own_part(cfg: DictConfig) -> DictConfig:
    """What is of the run: without Hydra's own part and without the sweep's."""
    return _without(cfg, "hydra", *cards.OF_SWEEPS)


def _without(cfg: DictConfig, *keys: str) -> DictConfig:
    with read_write(cfg), open_dict(cfg):
        for key in keys:
            cfg.pop(key, None)
    return cfg


def refuse_sweep_words(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for a word about a sweep where there is none."""
    for line in overrides:
        if line.startswith("+table"):
            raise ConfigError(
                f"{line}: is many runs. `peft-train -m {line}` runs them; `peft-train table {line}`"
                " shows what was printed."
            )
        if re.match(rf"[+~]*({'|'.join(cards.OF_SWEEPS)})\b", line):
            raise ConfigError(f"{line}: is about a sweep, which -m starts; this is one run.")


# -- The command line that Hydra users know --------------------------------------------------------
def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, wherever they stand."""
    parser = get_args_parser()
    parser.exit_on_error, parser.allow_abbrev = False, False
    parser.add_argument("--dry-run", action="store_true", help="list a sweep's members")
    parser.add_argument("--retry-failed", action="store_true", help="run failed members again")
    try:
        found, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as e:
        raise ConfigError(f"{e}. `peft-train --hydra-help` lists the flags.") from None
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        raise ConfigError(unknown_flag(flags[0], list(arguments)))
    found.overrides += rest
    folder = found.config_dir or found.config_path
    found.config_dirs = [Path(folder)] if folder else []
    found.multirun = found.multirun or "hydra.mode=MULTIRUN" in found.overrides
    return found


def main(
    args: argparse.Namespace,
    check: Callable[[DictConfig], Any],
    task: Task,
    sweep: Callable[[argparse.Namespace], int],
) -> int:
    """Do what the flags ask: show, complete, run `task`, or start a `sweep`.

    `check` refuses the configuration of a single run before anything is written.
    """
    if args.shell_completion:
        return _complete(args)
    commands = [
        args.run,
        args.cfg is not None,
        args.multirun,
        args.info is not None,
        args.hydra_help,
    ]
    if sum(commands) > 1:
        raise ConfigError(
            "only one of --run, --multirun, --cfg, --info and --hydra-help goes at a time."
        )
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve goes with --cfg.")
    if (args.dry_run or args.retry_failed) and not args.multirun:
        raise ConfigError("--dry-run and --retry-failed go with -m.")
    if args.multirun:
        return sweep(args)
    try:
        return _obey(args, check, task)
    except TaskFailed as envelope:
        raise envelope.content from None


def _obey(args: argparse.Namespace, check: Callable[[DictConfig], Any], task: Task) -> int:
    name = args.config_name or cards.ROOT
    with our_words(args.overrides, args.config_dirs):
        hydra = open_hydra(args.config_dirs)
        overrides = normalised(args.overrides, args.config_dirs)
        if args.hydra_help:
            hydra.hydra_help(config_name=name, args_parser=get_args_parser(), args=args)
        elif args.cfg:
            hydra.show_cfg(name, overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            with raising():
                hydra.show_info(args.info, config_name=name, overrides=overrides)
        else:
            return _run(hydra, name, overrides, check, task)
    return 0


@contextmanager
def raising() -> Iterator[None]:
    """Have `show_info` raise its errors, where Hydra would print them and exit."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _run(
    hydra: Hydra, name: str, overrides: list[str], check: Callable[[DictConfig], Any], task: Task
) -> int:
    """`Hydra.run`, but the configuration is checked before the run folder is touched."""
    refuse_sweep_words(overrides)
    cfg = hydra.compose_config(name, [*overrides, "hydra.mode=RUN"], RunMode.RUN)
    HydraConfig.instance().set_config(cfg)  # for `hydra:` interpolations
    check(own_part(cfg.copy()))
    _without(cfg, *cards.OF_SWEEPS)
    written = Path(cfg.hydra.run.dir, cfg.hydra.output_subdir or "", "config.yaml")
    if written.exists() and cfg.get("resume") != "never":
        with read_write(cfg.hydra):
            cfg.hydra.output_subdir = None  # an earlier start's record stays
    _make_folder(Path(cfg.hydra.run.dir))
    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name=name)
    result = run_job(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
        task_function=_in_folder(task),
        config=cfg,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        configure_logging=False,
    )
    callbacks.on_run_end(config=cfg, config_name=name, job_return=result)
    if isinstance(result._return_value, BaseException):  # `return_value` would print before raising
        raise result._return_value
    return result.return_value


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"run_dir={folder}: cannot be made ({e.strerror}). Choose another run_dir."
        ) from None


def _in_folder(task: Task) -> Callable[[DictConfig], int]:
    """Hydra's task: run_dir is the folder that Hydra made."""

    def run(cfg: DictConfig) -> int:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if "run_dir" not in cfg or Path(cfg.run_dir).absolute() != folder:
            with open_dict(cfg):
                cfg.run_dir = str(folder)
        try:
            return task(cfg, folder)
        except Exception as e:
            raise TaskFailed(e) from e

    return run


def _complete(args: argparse.Namespace) -> int:
    """Shell completion: our verbs, and Hydra's once the verb and a run folder are taken out."""
    query = next((o.partition("=")[2] for o in args.overrides if o.startswith("query=")), None)
    hydra = open_hydra(args.config_dirs)
    if query is None:
        hydra.shell_completion(config_name=cards.ROOT, overrides=args.overrides)
        return 0
    plugins = hydra.get_shell_to_plugin_map(hydra.config_loader)
    if query not in plugins:
        raise ConfigError(f"no completion for the shell {query!r}: {', '.join(plugins)}.")
    line = CompletionPlugin.strip_python_or_app_name(os.environ.get("COMP_LINE", ""))
    print(" ".join(completions(plugins[query][0], line)))
    return 0


def completions(plugin: CompletionPlugin, line: str) -> list[str]:
    """What may stand at the end of `line` (without the program's name)."""
    first, space, rest = line.partition(" ")
    if not space:
        verbs = [verb for verb in VERBS if verb.startswith(first)]
        return sorted([*verbs, *plugin._query(cards.ROOT, line)])
    if first in VERBS and first not in RUN_VERBS:
        keys = {"methods": folders.choices("method"), "explain": known_keys([])}.get(first, {})
        return sorted(key for key in keys if key.startswith(rest))
    words = (rest if first in RUN_VERBS else line).split(" ")
    kept = [
        word
        for word in words
        if not word or "=" in word or word == words[-1] or word in ("-m", "--multirun")
    ]
    return plugin._query(cards.ROOT, " ".join(kept))
