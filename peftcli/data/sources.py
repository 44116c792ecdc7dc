"""Where rows come from: an embedded set, files, a folder, a saved or a hub data set, folders of
images.

`locate` finds out which of them `dataset.path` means; the place found then tells its content
(`fingerprint`, for the cache's key; cheap, imports nothing big) and, only where nothing is cached,
reads itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peftcli.data import embedded
from peftcli.data.files import SUFFIXES, Row, is_data_file, read_file, table_rows
from peftcli.disk import sha256, write_whole
from peftcli.errors import ConfigError, DataError, did_you_mean, nearest
from peftcli.settings import Dataset

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLITS = (
    "train",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "eval",
)  # what files of a folder are named by
HUB_TIMEOUT = 10.0  # seconds to ask the hub for a commit
LOCAL = (
    f"a file ({' '.join(SUFFIXES)}), a folder of such files, "
    f"or an embedded set ({', '.join(embedded.NAMES)})"
)


class Place(Protocol):
    """Rows that can be identified without being read."""

    @property
    def folder(self) -> Path:
        """What relative image paths start from."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What tells this content from any other."""
        ...

    def read(self) -> list[Row]:
        """All rows, in a fixed order."""
        ...


def locate(path: str, cfg: Dataset, split: str, cache_dir: Path) -> Place:
    """The place that `path` names; an embedded set wins over a file of its name (./tweets)."""
    local = Path(path).expanduser()
    if path in embedded.NAMES:
        return Embedded(path)
    if local.is_file():
        return Files((local,))
    if local.is_dir():
        return _folder(local, split)
    if _looks_local(path):
        raise DataError(_no_such_file(local))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise DataError(f"dataset.path={path!r} is no file, no folder and no hub id. Give {LOCAL}.")
    return Hub(path, cfg.name, split, cfg.revision, cache_dir)


def check_keys(cfg: Dataset, place: Place) -> None:
    """Refuse keys of hub data sets for any other place."""
    for key, value in (("name", cfg.name), ("revision", cfg.revision)):
        if value is not None and not isinstance(place, Hub):
            raise ConfigError(
                f"dataset.{key}={value!r}: {cfg.path} is no data set of the hub. Remove it."
            )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or is_data_file(Path(path))


def _no_such_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"dataset.path={str(path)!r}: there is no folder {folder}. Give {LOCAL}."
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() or is_data_file(p))
    near = nearest(path.name, names) or names[:5]
    there = f"It has {', '.join(near)}." if near else "It has no data files."
    return f"dataset.path={str(path)!r}: no such file in {folder.resolve()}. {there} Give {LOCAL}."


@dataclass(frozen=True)
class Embedded:
    """A set of the package."""

    name: str
    folder: Path = embedded.FOLDER

    def fingerprint(self) -> dict[str, Any]:
        """By the packed file."""
        return {"embedded": self.name, "sha256": sha256(embedded.file_of(self.name))}

    def read(self) -> list[Row]:
        """All rows, unclear ones included."""
        return embedded.rows(self.name)


@dataclass(frozen=True)
class Files:
    """Data files, one behind the other."""

    paths: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """The first file's."""
        return self.paths[0].parent

    def fingerprint(self) -> dict[str, Any]:
        """By names and bytes."""
        return {"files": {path.name: sha256(path) for path in self.paths}}

    def read(self) -> list[Row]:
        """All rows of all files."""
        return [row for path in self.paths for row in read_file(path)]


def _folder(folder: Path, split: str) -> Place:
    """What a folder holds: a saved data set, data files, folders of images, or these in splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise DataError(
                f"{folder} has no split {split!r}; it has {', '.join(splits)}. Set dataset.split."
            )
        return Saved(folder / split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Saved(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and is_data_file(p))
    if files:
        return Files(_of_split(folder, files, split))
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    images = tuple(i for c in classes for i in sorted(c.iterdir()) if i.suffix.lower() in IMAGES)
    if images:
        return ImageFolders(folder, images)
    if (folder / split).is_dir():
        return _folder(folder / split, split)
    inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
    raise DataError(
        f"{folder} holds no data: {inside or 'nothing'}. Give {LOCAL}, or a folder with a folder a "
        "class."
    )


def _of_split(folder: Path, files: list[Path], split: str) -> tuple[Path, ...]:
    """All files, or where they are named by splits (train-0.jsonl, test.csv), those of this one."""
    words = {path: re.split(r"[^a-z]", path.name.lower())[0] for path in files}
    if split == "train" and not any(word in SPLITS for word in words.values()):
        return tuple(files)
    chosen = tuple(
        path for path in files if words[path] == split or path.name.split(".")[0] == split
    )
    if not chosen:
        names = ", ".join(path.name for path in files[:8])
        raise DataError(
            f"{folder} has no file of the split {split!r}: {names}. Set dataset.split or "
            "dataset.eval_split."
        )
    return chosen


@dataclass(frozen=True)
class ImageFolders:
    """One folder a class with its images: label by the folder's name."""

    folder: Path
    images: tuple[Path, ...]

    def fingerprint(self) -> dict[str, Any]:
        """By names and sizes; pixels are read when a batch is made and never cached."""
        listing = [(str(i.relative_to(self.folder)), i.stat().st_size) for i in self.images]
        return {"images": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}

    def read(self) -> list[Row]:
        """`image` relative to the folder, and `label`."""
        made = (
            {"image": str(i.relative_to(self.folder)), "label": i.parent.name} for i in self.images
        )
        return [Row(values, self.folder.name, n) for n, values in enumerate(made, 1)]


@dataclass(frozen=True)
class Saved:
    """A folder that `datasets.Dataset.save_to_disk` wrote."""

    folder: Path

    def fingerprint(self) -> dict[str, Any]:
        """By names and bytes of its files."""
        return {"files": {p.name: sha256(p) for p in sorted(self.folder.iterdir()) if p.is_file()}}

    def read(self) -> list[Row]:
        """Its rows, in its order."""
        import datasets

        saved = datasets.load_from_disk(str(self.folder))
        return table_rows(saved.with_format("arrow")[:], self.folder.name)


@dataclass(frozen=True)
class Hub:
    """A data set of the hub at the commit of `dataset.revision`, or else of its first use."""

    path: str
    name: str | None
    split: str
    revision: str | None
    cache_dir: Path

    @property
    def folder(self) -> Path:
        """Hub data sets carry their images with them."""
        return Path()

    def fingerprint(self) -> dict[str, Any]:
        """By commit."""
        return {"hub": self.path, "name": self.name, "split": self.split, "commit": self.commit()}

    def commit(self) -> str:
        """The commit of `revision`, asked for once and then kept beside the cache."""
        if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        kept = (
            self.cache_dir
            / "hub"
            / f"{self.path.replace('/', '--')}@{self.revision or 'main'}".replace(" ", "_")
        )
        if not kept.is_file():
            commit = self._ask()
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, commit)
        return kept.read_text()

    def _ask(self) -> str:
        from huggingface_hub import HfApi

        try:
            sha = HfApi().dataset_info(self.path, revision=self.revision, timeout=HUB_TIMEOUT).sha
        except Exception as error:  # whatever the hub, its client or the network raise: one message
            raise DataError(self._unreachable(error)) from error
        assert sha is not None
        return sha

    def read(self) -> list[Row]:
        """Its rows; downloads what is not in the hub's own cache."""
        import datasets

        try:
            loaded = datasets.load_dataset(
                self.path, self.name, split=self.split, revision=self.commit()
            )
        except Exception as error:  # as above
            raise DataError(self._unreachable(error)) from error
        assert isinstance(loaded, datasets.Dataset)
        return table_rows(loaded.with_format("arrow")[:], f"{self.path}/{self.split}")

    def _unreachable(self, error: Exception) -> str:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        return (
            f"dataset.path={self.path!r} is no file, no folder and no embedded set, and the hub "
            f"did not give it ({type(error).__name__}: "
            f"{reason}).{did_you_mean(self.path, embedded.NAMES)} Without a network give {LOCAL}; "
            "a data set saved by `save_to_disk` where there is a network can be copied here and "
            "named as a folder."
        )
