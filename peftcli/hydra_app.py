"""Everything that touches Hydra, its internals included: search path, composition, running, and its errors in our words.

Hydra's own entry point prints its errors and exits; here they are raised as `ConfigError`. Tested with hydra-core 1.3.
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
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job, setup_globals
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.completion_plugin import CompletionPlugin
from hydra.plugins.config_source import ConfigResult
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from peftcli import cards
from peftcli.errors import ConfigError, did_you_mean
from peftcli.suggest import nearest_keys

Task = Callable[[DictConfig, Path], int]  # the configuration and its run folder -> exit code
VERBS = ("train", "check", "eval", "generate", "export", "methods", "explain", "doctor")
RUN_VERBS = VERBS[:5]  # those that take overrides


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
    path.append("main", f"file://{cards.built_in('configs')}")
    for folder in cards.recipe_folders(config_dirs):
        if folder.name == "recipes":  # a user's `recipe/` is a group as it is
            path.append("recipes", f"recipes://{folder.absolute()}")
    path.append("schema", "structured://")
    return Hydra(task_name="train", config_loader=ConfigLoaderImpl(path))


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = (), name: str = cards.ROOT) -> DictConfig:
    """The configuration that `overrides` make of the primary file, interpolations kept, without Hydra's own part."""
    with our_words(overrides, config_dirs):
        setup_globals()
        cfg = open_hydra(config_dirs).compose_config(
            config_name=name, overrides=normalised(overrides, config_dirs), run_mode=RunMode.RUN
        )
        return _own_part(cfg)


def override(cfg: DictConfig, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """Apply overrides to a configuration that exists: values, and whole groups (`dataset=tweets`)."""
    with our_words(overrides, config_dirs, cfg):
        setup_globals()
        hydra = open_hydra(config_dirs)
        parsed = OverridesParser.create().parse_overrides(list(normalised(overrides, config_dirs)))
        groups = [o for o in parsed if hydra.config_loader.get_group_options(o.key_or_group)]
        if recipe := next((o for o in groups if o.key_or_group == "recipe"), None):
            raise ConfigError(f"{recipe.input_line}: a recipe is a whole run and cannot be put over a run folder.")
        if groups:
            lines = [str(o.input_line) for o in groups]
            fresh = _own_part(hydra.compose_config(config_name=cards.ROOT, overrides=lines, run_mode=RunMode.RUN))
            for group in groups:
                cfg[group.key_or_group] = fresh[group.key_or_group]
        OmegaConf.set_struct(cfg, True)
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in groups], cfg)
        return cfg


def normalised(overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    """Accept `recipe=NAME` for `+recipe=NAME`, and new entries of mappings (`scheduler.kwargs.x=1`) without the `+`."""
    result = []
    for line in overrides:
        if line.startswith("recipe="):
            line = f"+{line}"
        elif match := re.match(r"(\w+\.\w+)\.[^=]+=", line):
            files = cards.all_keys(config_dirs).get(match[1], [])
            if any(key.takes.startswith("a mapping to") for _, key in files):
                line = f"++{line}"
        result.append(line)
    return result


def _own_part(cfg: DictConfig) -> DictConfig:
    with read_write(cfg), open_dict(cfg):
        cfg.pop("hydra")
    return cfg


# -- The command line that Hydra users know ----------------------------------------------------------------------------
def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, wherever they stand."""
    parser = get_args_parser()
    parser.exit_on_error, parser.allow_abbrev = False, False
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


def unknown_flag(flag: str, words: Sequence[str]) -> str:
    """What to type instead of `--learning_rate 1e-4`."""
    key, _, value = flag.lstrip("-").partition("=")
    near = nearest_keys(key.replace("-", "_"), known_keys([]))
    if not near:
        return f"unknown flag {flag}. `peft-train --help` lists what there is."
    following = [word for word in words[words.index(flag) + 1 :][:1] if not word.startswith("-") and "=" not in word]
    return f"unknown flag {flag}: options are written {near[0]}={value or (following or ['VALUE'])[0]}"


def main(args: argparse.Namespace, check: Callable[[DictConfig], Any], task: Task) -> int:
    """Do what the flags ask: show, complete, or run `task`, once or for every member of a sweep.

    `check` refuses the configuration of a single run before anything is written.
    """
    if args.shell_completion:
        return _complete(args)
    commands = [args.run, args.cfg is not None, args.multirun, args.info is not None, args.hydra_help]
    if sum(commands) > 1:
        raise ConfigError("only one of --run, --multirun, --cfg, --info and --hydra-help goes at a time.")
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve goes with --cfg.")
    name = args.config_name or cards.ROOT
    with our_words(args.overrides, args.config_dirs):
        hydra = open_hydra(args.config_dirs)
        overrides = normalised(args.overrides, args.config_dirs)
        if args.hydra_help:
            hydra.hydra_help(config_name=name, args_parser=get_args_parser(), args=args)
        elif args.cfg:
            hydra.show_cfg(name, overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            hydra.show_info(args.info, config_name=name, overrides=overrides)
        elif args.multirun:
            return _multirun(hydra, name, overrides, task)
        else:
            return _run(hydra, name, overrides, check, task)
    return 0


def _run(hydra: Hydra, name: str, overrides: list[str], check: Callable[[DictConfig], Any], task: Task) -> int:
    """`Hydra.run`, but the configuration is checked before the run folder is touched."""
    cfg = hydra.compose_config(name, [*overrides, "hydra.mode=RUN"], RunMode.RUN)
    HydraConfig.instance().set_config(cfg)  # for `hydra:` interpolations
    check(_own_part(cfg.copy()))
    written = Path(cfg.hydra.run.dir, cfg.hydra.output_subdir or "", "config.yaml")
    if written.exists() and cfg.get("resume") != "never":
        with read_write(cfg.hydra):
            cfg.hydra.output_subdir = None  # an earlier start's record stays
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


def _multirun(hydra: Hydra, name: str, overrides: list[str], task: Task) -> int:
    """Hydra's sweep; the task starts a process of its own for every member."""
    if any(line.startswith("run_dir=") for line in overrides):
        raise ConfigError("run_dir is the folder of one run. Members of a sweep lie in hydra.sweep.dir=FOLDER.")
    overrides = [*overrides, "hydra.mode=MULTIRUN"]
    results = hydra.multirun(config_name=name, task_function=_in_folder(task), overrides=overrides)
    return max((job.return_value for batch in results for job in batch), default=0)


def _in_folder(task: Task) -> Callable[[DictConfig], int]:
    """Hydra's task: run_dir is the folder that Hydra made."""

    def run(cfg: DictConfig) -> int:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if "run_dir" not in cfg or Path(cfg.run_dir).absolute() != folder:
            with open_dict(cfg):
                cfg.run_dir = str(folder)
        return task(cfg, folder)

    return run


def _complete(args: argparse.Namespace) -> int:
    """Shell completion: Hydra's, and our verbs. The line is Hydra's once the verb and a run folder are taken out."""
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
        keys = {"methods": cards.choices("method"), "explain": known_keys([])}.get(first, {})
        return sorted(key for key in keys if key.startswith(rest))
    words = (rest if first in RUN_VERBS else line).split(" ")
    kept = [word for word in words if not word or "=" in word or word == words[-1] or word in ("-m", "--multirun")]
    return plugin._query(cards.ROOT, " ".join(kept))


# -- Errors in our words -----------------------------------------------------------------------------------------------
@contextmanager
def our_words(overrides: Sequence[str], config_dirs: Sequence[Path], cfg: DictConfig | None = None) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into one message that says what to type."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, where Hydra would print and exit
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError, OSError) as e:
        raise ConfigError(_in_our_words(e, overrides, config_dirs, cfg)) from e
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _in_our_words(e: BaseException, overrides: Sequence[str], config_dirs: Sequence[Path], cfg: DictConfig | None) -> str:
    if isinstance(e, OverrideParseException):
        return _unreadable(e.override)
    if isinstance(e, MarkedYAMLError):
        return _broken_yaml(e)
    if isinstance(e, UnicodeDecodeError):
        return f"{_not_utf8(config_dirs)}: is not UTF-8 text ({e})."
    if isinstance(e, MissingConfigException):
        return _no_such_choice(e, config_dirs)
    text = str(e)
    if match := re.search(r"Could not (?:override|delete|append)[^']*'([^']*)'", text):
        return _no_such_key(match[1], text, overrides, config_dirs, cfg)
    if match := re.match(r"Override (\S+) looks like a config group", text):
        return _no_such_key(match[1].lstrip("+~").split("=")[0].split("@")[0], text, overrides, config_dirs, cfg)
    if match := re.search(r"Multiple values for (\S+)\. To override", text):
        return f"{match[1]} is chosen twice; to choose another one, write {match[1]}=NAME without +."
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: a sweep over values needs -m; a list is '{key}=[{value}]'; text with a comma \"{key}='{value}'\"."
    if "Config group override must be" in text:
        return _not_a_choice(overrides, config_dirs)
    if match := re.match(r"invalid literal for int\(\) with base 10: '(.*)'", text):
        key = next((o.partition("=")[0].removesuffix(f".{match[1]}") for o in overrides if f".{match[1]}" in o), "a list")
        return f"{key} is a list; give it whole: '{key}=[a,b]'."
    causes = [str(c) for c in (e, e.__cause__) if c is not None and str(c)]
    lines = [line.strip() for text in causes for line in text.splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith("object_type=")) or type(e).__name__


def _unreadable(line: str) -> str:
    word = line.lstrip("+~")
    if word.endswith((".yaml", ".yml")) and "=" not in word:
        return (
            f"{line!r}: a recipe is chosen by its name. Put the file into a folder named recipes and type"
            f" peft-train --config-dir FOLDER_ABOVE +recipe={Path(word).stem}"
        )
    if re.fullmatch(r"[\w-]+", word):
        return (
            f"{line!r} is neither a verb nor key=value.{did_you_mean(word, VERBS)} Verbs: {', '.join(VERBS)};"
            f" an option is written {(nearest_keys(word, known_keys([]), 1) or ['key'])[0]}=VALUE."
        )
    return (
        f"cannot read {line!r}: an option is key=value, a list is 'key=[a,b]', and a value with spaces or any of"
        f" ,:{{}}[]()$= stands in quotes of its own inside the shell's: \"key='a, b'\"."
    )


def _broken_yaml(e: MarkedYAMLError) -> str:
    mark = e.problem_mark or e.context_mark
    where = f"{cards.shown(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
    return f"{where}{e.problem or e.context}."


def _not_utf8(config_dirs: Sequence[Path]) -> str:
    for folder in config_dirs:
        for path in folder.rglob("*.yaml"):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return cards.shown(path)
    return "a configuration file"


def _no_such_choice(e: MissingConfigException, config_dirs: Sequence[Path]) -> str:
    """A group's file, or the primary one, that does not exist."""
    group, _, given = (e.missing_cfg_file or "").rpartition("/")
    place = re.match(r"In '([^']+)': ", str(e))
    within = f"{place[1]}: " if place and place[1] != cards.ROOT else ""
    if not group:
        if given not in known_keys(config_dirs):
            return f"{within}no file {given}.yaml in {', '.join(map(cards.shown, cards.config_folders(config_dirs)))}."
        return f"{within}{given}: needs a choice: {', '.join(cards.choices(given, config_dirs))}."
    options = e.options or []
    if not options:
        return f"{within}no group {group!r}.{_meant(group, config_dirs)}"
    return f"{within}{group}={given}: no such choice.{did_you_mean(given, options)} All: {', '.join(options)}."


def _not_a_choice(overrides: Sequence[str], config_dirs: Sequence[Path]) -> str:
    """`trainer=3`: a group wants one of its files."""
    for line in overrides:
        group, _, given = line.lstrip("+").partition("=")
        options = cards.choices(group, config_dirs) if group in cards.GROUPS else {}
        if options and given not in options:
            return f"{line}: no such choice. All: {', '.join(options)}."
    return "the choice of a group is a name."


def _no_such_key(
    key: str, text: str, overrides: Sequence[str], config_dirs: Sequence[Path], cfg: DictConfig | None
) -> str:
    if "already at" in text:
        return f"+{key}: exists already; leave out the +."
    if not key:
        return _unreadable(next((o for o in overrides if o.startswith("=")), "="))
    place = re.match(r"In '([^']+)': ", text)
    within = f"{place[1]}: " if place else ""
    if "delete" in text and not place:
        within = f"~{key}: "
    return f"{within}{no_key(key, config_dirs, chosen(overrides, cfg))}"


def chosen(overrides: Sequence[str], cfg: DictConfig | None = None) -> dict[str, str]:
    """The choice of every group as far as the command line tells; of a run folder, nothing but its targets."""
    given = {} if cfg is not None else cards.defaults()
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key in cards.GROUPS:
            given[key] = value
    return given


def known_keys(config_dirs: Sequence[Path]) -> list[str]:
    """All keys, and the groups themselves."""
    return [*cards.GROUPS, "recipe", *cards.all_keys(config_dirs)]


def no_key(key: str, config_dirs: Sequence[Path], choices: dict[str, str] | None = None) -> str:
    """'no key X', what was probably meant, and who has it where only another choice of the group does."""
    files = cards.all_keys(config_dirs).get(key, [])
    if files:
        having = ", ".join(f"{card.group}={card.choice}" for card, _ in files)
        now = f"{files[0][0].group}={choices[files[0][0].group]}" if choices and files[0][0].group in choices else "this choice"
        return f"no key {key!r} in {now}; {having} has it."
    return f"no key {key!r}.{_meant(key, config_dirs)}"


def _meant(key: str, config_dirs: Sequence[Path]) -> str:
    keys = known_keys(config_dirs)
    near = nearest_keys(key, keys)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    group = key.partition(".")[0]
    siblings = [k for k in keys if k.startswith(f"{group}.")]
    if siblings:
        return f" Keys of {group}: {', '.join(k.partition('.')[2] for k in siblings)}."
    return f" Groups: {', '.join(cards.GROUPS)}; `peft-train explain GROUP` lists their keys."
