"""From words to a typed run: recipes, groups, a user's own folder, run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from peftcli import cards, config, folders, hydra_words
from peftcli.errors import ConfigError, DataError
from peftcli.methods.full import Full
from peftcli.methods.lora import LoRA
from peftcli.settings import Run, Source
from peftcli.suggest import ALIASES

GIVEN = ["dataset.path=x", "model.name_or_path=x"]  # what some files leave to the user


@pytest.mark.parametrize("recipe", sorted(folders.recipes()))
def test_every_recipe_is_a_checked_run_of_its_name(recipe: str) -> None:
    run = config.typed(config.compose([f"+recipe={recipe}", *GIVEN]))
    assert run.name == recipe
    assert run.run_dir.startswith(f"outputs/{recipe}/")
    header = folders.recipes()[recipe].read_text(encoding="utf-8").splitlines()
    assert header[0] == "# @package _global_"
    commands = [line.replace("-m ", "") for line in header if line.startswith("#   peft-train ")]
    assert any(line.startswith(f"#   peft-train +recipe={recipe}") for line in commands)


@pytest.mark.parametrize("group", cards.RUN_GROUPS)
def test_every_choice_of_a_group_composes(group: str) -> None:
    for choice in folders.choices(group):
        cfg = config.compose([f"{group}={choice}", *GIVEN])
        assert getattr(config.typed(cfg), group) is not None


def test_values_come_typed() -> None:
    words = [
        "method.alpha=32",
        "method.target_modules=[q,k]",
        "optimizer.lr=1e-3",
        "dataset.columns.text=t",
    ]
    run = config.typed(config.compose(words))
    assert run.method == LoRA(alpha=32.0, target_modules=("q", "k"))
    assert isinstance(run.method.alpha, float)
    assert run.optimizer.cls == "torch.optim.AdamW"
    assert run.optimizer.lr == 1e-3
    assert run.optimizer.kwargs == {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}
    assert run.dataset.columns["text"] == "t"
    assert run.dataset.choices == ("negative", "positive")


def test_a_mixture_comes_typed() -> None:
    run = config.typed(config.compose(["dataset=sentiment_mixture"]))
    assert run.dataset.mixture[0] == Source("movie_reviews", weight=2.0)


def test_an_optimizer_takes_further_arguments_of_its_class() -> None:
    run = config.typed(config.compose(["optimizer=sgd", "+optimizer.maximize=true"]))
    assert run.optimizer.kwargs["maximize"] is True


def test_every_alias_names_a_key_or_a_group() -> None:
    known = hydra_words.known_keys([])
    assert {alias: key for alias, key in ALIASES.items() if key not in known} == {}


def test_a_user_s_folder_joins_and_wins(tmp_path: Path) -> None:
    for name, text in {
        "recipes/mine.yaml": "# @package _global_\nname: mine\n"
        "defaults:\n  - override /method: wide\n",
        "recipe/other.yaml": "# @package _global_\nname: other\n",
        "method/wide.yaml": "_target_: peftcli.methods.lora.LoRA\nr: 64\n",
        "method/full.yaml": "_target_: peftcli.methods.full.Full\ntrain_head: false\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    mine = config.typed(config.compose(["+recipe=mine"], [tmp_path]), [tmp_path])
    assert (mine.name, mine.method) == ("mine", LoRA(r=64))
    assert config.compose(["recipe=other"], [tmp_path]).name == "other"
    full = config.typed(config.compose(["method=full"], [tmp_path]), [tmp_path])
    assert full.method == Full(train_head=False)
    with pytest.raises(ConfigError, match=r"Did you mean mine.*All: .*lora_llama.*mine"):
        config.compose(["+recipe=mien"], [tmp_path])


def test_a_recipe_s_method_and_optimizer_keys_belong_to_its_own_choice(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "child.yaml").write_text(
        "# @package _global_\ndefaults:\n  - lora_llama\n  - _self_\n  - override /method: full\n"
        "name: child\nmethod: {train_head: false}\n"
    )

    def compose(*words: str) -> Run:
        return config.typed(config.compose(words, [tmp_path]), [tmp_path])

    assert compose("+recipe=lora_llama").method == LoRA(
        r=16, alpha=32.0, target_modules="all-linear"
    )
    assert compose("+recipe=lora_llama", "method=full").method == Full()
    assert compose("+recipe=lora_llama").optimizer.lr == 5e-4
    assert compose("+recipe=lora_llama", "optimizer=sgd").optimizer.lr == 1e-2
    assert compose("+recipe=lora_llama", "dataset=tweets").trainer.per_device_train_batch_size == 16
    assert compose("+recipe=child").method == Full(train_head=False)
    assert compose("+recipe=child").optimizer.lr == 5e-4
    assert compose("+recipe=child", "method=lora").method == compose("+recipe=lora_llama").method


def test_a_run_folder_is_loaded_with_values_and_groups_over_it(tmp_path: Path) -> None:
    config.save(config.compose(["+recipe=lora_llama", "method.r=3"]), tmp_path)
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert "$" not in OmegaConf.to_yaml(saved)
    plain = config.typed(config.load(tmp_path))
    assert (plain.method.r, plain.run_dir) == (3, str(tmp_path))
    changed = config.typed(
        config.load(
            tmp_path,
            [
                "dataset=tweets",
                "method.alpha=2",
                "scheduler=cosine",
                "scheduler.kwargs.num_cycles=1",
            ],
        )
    )
    assert (changed.dataset.path, changed.method) == (
        "tweets",
        LoRA(r=3, alpha=2.0, target_modules="all-linear"),
    )
    assert changed.scheduler.kwargs == {"num_cycles": 1}
    with pytest.raises(ConfigError, match=r"Did you mean method\.alpha"):
        config.load(tmp_path, ["method.lora_alpha=2"])
    with pytest.raises(ConfigError, match="cannot be put over a run folder"):
        config.load(tmp_path, ["+recipe=lora_llama"])


def test_a_broken_run_folder_is_told_from_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        config.load(tmp_path)
    (tmp_path / "config.yaml").write_text("name: [\n")
    with pytest.raises(DataError, match=r"config\.yaml, line 2"):
        config.load(tmp_path)


# (the file's text, what the one message must hold)
BROKEN = {
    "a key twice": (
        "trainer:\n  max_steps: 1\n  max_steps: 2\n",
        ["x.yaml, line 4", "duplicate key max_steps"],
    ),
    "broken YAML": ("trainer:\n  max_steps: [1\nname: x\n", ["x.yaml, line 4"]),
    "an unknown key": (
        "trainer: {max_stps: 1}\n",
        ["trainer.max_stps", "Did you mean trainer.max_steps"],
    ),
    "a key in no group": ("lr: 1\n", ["'lr'", "optimizer.lr"]),
    "an unknown group": ("defaults: [{override /modle: gpt2}]\n", ["modle", "Did you mean model"]),
    "an unknown choice": ("defaults: [{override /model: gtp2}]\n", ["gtp2", "Did you mean gpt2"]),
    "code": ("name: !!python/object/apply:os.system [ls]\n", ["x.yaml, line 2", "os.system"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_one_message(case: str, tmp_path: Path) -> None:
    text, expected = BROKEN[case]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "x.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError) as raised:
        config.typed(config.compose(["+recipe=x"], [tmp_path]), [tmp_path])
    for part in expected:
        assert part in str(raised.value)


def test_a_recipe_without_its_package_line_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "x.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="# @package _global_"):
        config.typed(config.compose(["+recipe=x"], [tmp_path]))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.optim.swa_utils.os.system",
        "torch.optim.lr_scheduler.LRScheduler",
        "peftcli.cli.main",
    ],
)
def test_a_target_outside_of_the_allowed_packages_and_kinds_is_refused(target: str) -> None:
    for group in ("method", "optimizer", "trainer"):
        with pytest.raises(ConfigError, match=rf"{group}\._target_={target}"):
            config.typed(config.compose([f"{group}._target_={target}"]))
