"""`peft-train methods NAME` and `peft-train explain`: the cards on a screen, or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from peftcli import cards, folders
from peftcli.cards import Card, Key
from peftcli.catalog import Wanted, first_line, screen, table
from peftcli.errors import ConfigError, did_you_mean
from peftcli.suggest import ALIASES, nearest_keys
from peftcli.traits import paper, traits


# -- methods ---------------------------------------------------------------------------------------
def method(name: str, config_dirs: Sequence[Path], as_json: bool) -> int:
    """The equation and the options of one method."""
    card = cards.find_method(name, config_dirs)
    if as_json:
        print(json.dumps(_as_data(card), indent=2))
        return 0
    console = screen()
    console.print(escape(paper(card.target)))
    console.print()
    console.print(_options(card))
    console.print()
    console.print(_about_traits(card))
    console.print(f"\n{escape(card.command)}", style="green")
    return 0


def methods_as_json(config_dirs: Sequence[Path], wanted: Wanted) -> int:
    """All methods whose traits are wanted, with their options."""
    found = [c for c in cards.cards("method", config_dirs) if wanted(traits(c.target))]
    print(json.dumps([_as_data(card) for card in found], indent=2))
    return 0


def _about_traits(card: Card) -> Table:
    """What a method goes with, in sentences."""
    has = traits(card.target)
    own = has.exports == "own"
    rows = [
        ("family", has.family),
        ("data", ", ".join(has.modalities)),
        ("merging", "folds into the weights" if has.mergeable else "stays beside the weights"),
        ("few bits", "trains on such a base" if has.quantisable else "needs a full base"),
        ("pre-pass", "looks at the task first, at least with some options")
        if has.pre_pass
        else ("pre-pass", "none"),
        ("published as", "an adapter in our own format" if own else has.exports),
        (
            "cost",
            f"peft-train check model=llama2_7b method={card.choice}    counts it exactly"
            if has.counted
            else "as many numbers as the task's data choose; peft-train check counts them then",
        ),
    ]
    return table("", "", rows=rows, title="goes with")


def _as_data(card: Card) -> dict[str, Any]:
    return {
        "name": card.choice,
        **dataclasses.asdict(traits(card.target)),
        "summary": first_line(card.target),
        "description": paper(card.target),
        "target": card.target,
        "command": card.command,
        "file": str(card.path),
        "options": [_key_data(key) for key in card.keys],
    }


def _key_data(key: Key) -> dict[str, str]:
    return {"name": key.name, "default": key.default, "takes": key.takes, "meaning": key.meaning}


def _options(card: Card) -> Table:
    rows = [(k.name, k.default, k.takes, k.meaning) for k in card.keys]
    return table("key", "default", "takes", "meaning", rows=rows, title=folders.shown(card.path))


# -- explain ---------------------------------------------------------------------------------------
def explain(key: str | None, config_dirs: Sequence[Path], as_json: bool) -> int:
    """A key, a group, one choice of a group, or, without a word, what groups there are."""
    if key is None:
        return _groups(config_dirs, as_json)
    key = key.lstrip("+~")
    group, equals, choice = key.partition("=")
    if group == "recipe":
        return _recipes(choice, config_dirs, as_json)
    if group in cards.GROUPS:
        return (
            _choice(group, choice, config_dirs, as_json)
            if equals
            else _group(group, config_dirs, as_json)
        )
    return _key(_full(group, config_dirs), config_dirs, as_json)


def _full(key: str, config_dirs: Sequence[Path]) -> str:
    """The full key of a word: itself, the only one of that name (those of methods come after the
    run's own), or what another tool calls so.
    """
    known = cards.all_keys(config_dirs)
    if key in known:
        return key
    named = [k for k in known if k.rpartition(".")[2] == key]
    meant = ALIASES.get(key.rpartition(".")[2], "")
    of_runs = [k for k in named if not k.startswith("method.")]
    for only in (named, of_runs):
        if len(only) == 1:
            return only[0]
    if not named and meant in known:
        return meant
    near = named or nearest_keys(key, [*known, *cards.GROUPS])
    hint = (
        f" Did you mean {' or '.join(near)}?" if near else " `peft-train explain` lists the groups."
    )
    raise ConfigError(f"no key {key!r}.{hint}")


def _groups(config_dirs: Sequence[Path], as_json: bool) -> int:
    chosen = cards.defaults()
    found = {group: sorted(folders.choices(group, config_dirs)) for group in cards.GROUPS}
    top = cards.root_card(config_dirs)
    if as_json:
        data = {g: {"default": chosen.get(g), "choices": c} for g, c in found.items()}
        print(json.dumps({"groups": data, "keys": [_key_data(k) for k in top.keys]}, indent=2))
        return 0
    rows = [(g, chosen.get(g, ""), ", ".join(names)) for g, names in found.items()]
    rows.append(("recipe", "", ", ".join(sorted(folders.recipes(config_dirs)))))
    console = screen()
    console.print(table("group", "default", "choices", rows=rows))
    console.print()
    console.print(_options(top))
    return 0


def _group(group: str, config_dirs: Sequence[Path], as_json: bool) -> int:
    found = cards.cards(group, config_dirs)
    default = cards.defaults().get(group)
    if as_json:
        listed = [{"name": c.choice, "summary": _about(c), "file": str(c.path)} for c in found]
        shared = [_key_data(k) for k in next((c.keys for c in found if c.choice == default), ())]
        print(
            json.dumps(
                {"group": group, "default": default, "choices": listed, "keys": shared}, indent=2
            )
        )
        return 0
    rows = [
        (f"{group}={c.choice}", "default" if c.choice == default else "", _about(c)) for c in found
    ]
    console = screen()
    console.print(table("choice", "", "what it is", rows=rows))
    if chosen := next((c for c in found if c.choice == default), None):
        console.print()
        console.print(_options(chosen))
    return 0


def _about(card: Card) -> str:
    return first_line(card.target) if card.group == "method" else card.summary


def _choice(group: str, choice: str, config_dirs: Sequence[Path], as_json: bool) -> int:
    found = {c.choice: c for c in cards.cards(group, config_dirs)}
    if choice not in found:
        raise ConfigError(
            f"{group}={choice}: no such choice.{did_you_mean(choice, found)}"
            f" All: {', '.join(found)}."
        )
    card = found[choice]
    if as_json:
        data = {"group": group, "choice": choice, "summary": _about(card), "file": str(card.path)}
        print(json.dumps(data | {"keys": [_key_data(k) for k in card.keys]}, indent=2))
        return 0
    screen().print(escape(_about(card)))
    screen().print(_options(card))
    return 0


def _recipes(name: str, config_dirs: Sequence[Path], as_json: bool) -> int:
    found = folders.recipes(config_dirs)
    if name and name not in found:
        raise ConfigError(
            f"recipe={name}: no such recipe.{did_you_mean(name, found)} All: {', '.join(found)}."
        )
    if name and not as_json:
        print(found[name].read_text(encoding="utf-8"), end="")
        return 0
    read = [
        cards.read_card("recipe", n, path) for n, path in sorted(found.items()) if name in ("", n)
    ]
    if as_json:
        print(
            json.dumps(
                [{"name": c.choice, "summary": c.summary, "file": str(c.path)} for c in read],
                indent=2,
            )
        )
        return 0
    screen().print(
        table("recipe", "what it is", rows=[(f"+recipe={c.choice}", c.summary) for c in read])
    )
    return 0


def _key(key: str, config_dirs: Sequence[Path], as_json: bool) -> int:
    chosen = cards.defaults()
    files = sorted(
        cards.all_keys(config_dirs)[key], key=lambda f: chosen.get(f[0].group) != f[0].choice
    )
    if as_json:
        listed = [
            _key_data(k) | {"name": key, "choice": c.choice, "file": str(c.path)} for c, k in files
        ]
        print(json.dumps(listed, indent=2))
        return 0
    console = screen()
    console.print(escape(key), style="bold cyan")
    for (meaning, takes), cards_of in _same(files).items():
        console.print(f"  {escape(meaning)}")
        if takes:
            console.print(f"  [bold]takes[/]    {escape(takes)}")
        for default, names in cards_of.items():
            console.print(
                f"  [bold]default[/]  {escape(default)}" + f"   [dim]{escape(', '.join(names))}[/]"
            )
    console.print(f"  [bold]file[/]     {escape(folders.shown(files[0][0].path))}")
    return 0


def _same(files: Sequence[tuple[Card, Key]]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """What files say of a key: (meaning, takes) -> default -> the choices that have it so."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for card, key in files:
        where = found.setdefault((key.meaning, key.takes), {}).setdefault(key.default, [])
        where.append(f"{card.group}={card.choice}" if card.group else folders.shown(card.path))
    return found
