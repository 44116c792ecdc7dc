"""What a model's folder must hold: configuration, whole safetensors or a GGUF file, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from peftcli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.txt", "vocab.json", "preprocessor_config.json"),  # the last belongs to image models
)


def check_folder(folder: Path, needs_tokenizer: bool = True) -> str | None:
    """Name of the folder's GGUF file; None for safetensors. DataError where a file is missing."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    gguf = weights_among(names, folder)
    if gguf:
        return gguf
    if "adapter_config.json" in names and "config.json" not in names:
        raise DataError(f"{folder} is an adapter. model.name_or_path names the model beneath it.")
    if "config.json" not in names:
        raise DataError(f"{folder} has no config.json, which says what model its weights are.")
    if needs_tokenizer and not names & set(TOKENIZERS):
        raise DataError(
            f"{folder} has no tokenizer (tokenizer.json) and no image processor "
            "(preprocessor_config.json). Put them there, or name another folder: model.tokenizer."
        )
    for path in weight_files(folder):
        _check_safetensors(path)
    return None


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files by name; DataError where a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = folder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if strange := [shard for shard in shards if shard != Path(shard).name]:
        raise DataError(f"{index} names {strange[0]!r}, which is no file's name in this folder.")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists.")
    return [folder / shard for shard in shards]


def read_weight(folder: Path, names: Iterable[str]) -> Tensor | None:
    """The tensor with the first of `names` that the folder's safetensors hold, or None."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in set(names) & set(file.keys()):
                return file.get_tensor(name)
    return None


def check_tokenizer(folder: Path) -> None:
    """DataError where the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(f"{folder} has no tokenizer.")


def weights_among(names: Iterable[str], place: object) -> str | None:
    """Name of the GGUF file among `names`; None for safetensors; DataError for anything else."""
    names = sorted(names)
    if any(name.endswith(".safetensors") for name in names):
        return None
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise DataError(
            f"{place} has several GGUF files ({', '.join(ggufs)}). "
            "Name one: model.name_or_path=/path/to/file.gguf."
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise DataError(
            f"{place} has its weights in {pickles[0]}. Reading such a file can run any code, so "
            "only safetensors are read. If you trust it, convert it: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise DataError(f"{place} has no weights (*.safetensors or *.gguf).")


def _check_safetensors(path: Path) -> None:
    """Compare the file's size with what its header promises: a cut download is told at once."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= size - 8 else b""
    try:
        entries = json.loads(header)
    except ValueError:
        raise DataError(f"{path} is no safetensors file, or cut off ({size} bytes).") from None
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    if whole != size:
        raise DataError(
            f"{path} is cut off: it has {size} bytes instead of {whole}. Fetch it again."
        )
