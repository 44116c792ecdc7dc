"""GGUF files, as llama.cpp reads them, made into plain safetensors folders once.

Reading one takes ten seconds and more, a converted one nothing. The weights become float32, exactly
as dequantised. The folder is written aside under a lock and renamed when whole: two processes, or a
kill at any moment, leave either nothing or a complete folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peftcli.errors import DataError
from peftcli.models.quiet import quiet
from peftcli.models.source import Source, fingerprint

FORMAT = 1  # of the converted folder; a change makes all of them anew
MANIFEST = "manifest.json"
# Names of llama.cpp for the ways to cut text before merging. These isolate every digit first, which
# transformers 5.23 leaves out: "=  5" would become ("=", " ", " 5") instead of ("=", "  ", "5").
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN_GPT2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais"}


def folder_of(source: Source) -> Path:
    """The source's folder of safetensors; for a GGUF file the converted one, made if need be."""
    if source.gguf is None:
        return source.path
    short = re.sub(r"[^\w.-]+", "-", Path(source.gguf).stem)
    folder = source.cache / "models" / f"{short}-{fingerprint(source, source.cache)[:16]}-{FORMAT}"
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):  # another process may have been first
            _make(source, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the manifest, which is written last, is there and every file has its size."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    sizes = json.loads(manifest.read_text())["files"]
    paths = {name: folder / name for name in sizes}
    return all(path.is_file() and path.stat().st_size == sizes[n] for n, path in paths.items())


def _make(source: Source, folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        shutil.rmtree(left)
    start = time.perf_counter()
    print(f"Converting {source.gguf} to safetensors, once ...", file=sys.stderr, flush=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source, aside)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        manifest = {"source": source.name, "revision": source.revision, "files": sizes}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"... done in {time.perf_counter() - start:.0f} s: {folder}", file=sys.stderr, flush=True)


def _convert(source: Source, folder: Path) -> None:
    assert source.gguf is not None
    file = source.path / source.gguf
    model = _read_model(source.path, source.gguf)
    with quiet():
        model.save_pretrained(folder)
    cut = _pre_tokenizer_name(file)
    if not _knows(cut):
        return  # a tokenizer that cuts text wrongly is worse than none; loading it says what to do
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf)
    if cut in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        # before 5.23 transformers took the first for the second and left the third out
        token = getattr(model.config, f"{role}_id", None)
        if token is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token))
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _read_model(folder: Path, gguf: str) -> Any:
    """The model of a GGUF file as a plain float32 one."""
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
    except ImportError as error:
        raise DataError(f"{gguf} needs the package gguf to be read: pip install gguf.") from error
    except (ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise DataError(f"{gguf} cannot be converted: {error}. Is the file whole?") from None
    assert all(p.is_floating_point() for p in model.parameters()), "weights are still packed"
    _clear_quantised_flags(model)
    return model


def _clear_quantised_flags(model: Any) -> None:
    """A model read from GGUF counts as quantised and refuses to be saved, although it is plain."""
    model.is_quantized = False
    model.hf_quantizer = None
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _pre_tokenizer_name(file: Path) -> str | None:
    """The file's `tokenizer.ggml.pre`: a key, its type (8, a string), a length, and the name."""
    key = b"tokenizer.ggml.pre"
    with open(file, "rb") as opened:
        head = opened.read(1 << 20)
    at = head.find(struct.pack("<Q", len(key)) + key)
    if at < 0:
        return None
    kind, length = struct.unpack_from("<IQ", head, at + 8 + len(key))
    assert kind == 8, f"{file}: tokenizer.ggml.pre is no string"
    start = at + 8 + len(key) + 12
    return head[start : start + length].decode()


def _knows(cut: str | None) -> bool:
    """Whether text is cut right for this name, by us or by transformers."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # before 5.23 transformers cut all text as for GPT-2
        return cut is None or cut in _DIGITS_FIRST | _PLAIN_GPT2
    return cut is None or cut in _DIGITS_FIRST | _PLAIN_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys()
