"""GPTQ's and AWQ's layouts written from their definitions, one number at a time, for checkpoints to
read in tests. Nothing here is shared with what reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output at each place of a word, lowest bits first


@dataclass(frozen=True)
class Written:
    """A linear in few bits: its tensors by their names in a file, and what they mean (O, I)."""

    tensors: dict[str, Tensor]
    W: Tensor


def stream(numbers: list[int], bits: int) -> list[int]:
    """Unsigned 32-bit words that hold the numbers one after the other, low bits first."""
    long = sum(int(number) << (bits * place) for place, number in enumerate(numbers))
    return [(long >> (32 * word)) & 0xFFFFFFFF for word in range(len(numbers) * bits // 32)]


def words(rows: list[list[int]]) -> Tensor:
    """Unsigned words as the int32 that files have."""
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32).copy())


def gptq(
    W: Tensor, bits: int, group_size: int, version: int = 1, order: Tensor | None = None
) -> Written:
    """`W` (O, I) rounded to codes; `order` (I,) permutes the inputs among the groups, as act-order
    does.
    """
    codes, zeros, scales, groups = rounded(W, bits, group_size, order)
    columns = [stream([int(code) for code in column], bits) for column in codes.T]
    stored = [[int(z) - (version == 1) for z in row] for row in zeros]
    return Written(
        {
            "qweight": words(
                [[column[word] for column in columns] for word in range(len(columns[0]))]
            ),
            "qzeros": words([stream(row, bits) for row in stored]),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        },
        meaning(codes, zeros, scales, groups),
    )


def awq(W: Tensor, group_size: int) -> Written:
    """`W` (O, I) rounded to codes of 4 bits in the layout `gemm`."""
    codes, zeros, scales, groups = rounded(W, 4, group_size, None)
    return Written(
        {
            "qweight": words([interleaved(row) for row in codes]),
            "qzeros": words([interleaved(row) for row in zeros]),
            "scales": torch.from_numpy(scales),
        },
        meaning(codes, zeros, scales, groups),
    )


def interleaved(row: Any) -> list[int]:
    """Eight outputs a word, in AWQ's places."""
    return [
        sum(int(row[start + output]) << (4 * place) for place, output in enumerate(AWQ_PLACES))
        for start in range(0, len(row), 8)
    ]


def rounded(W: Tensor, bits: int, group_size: int, order: Tensor | None) -> tuple[Any, ...]:
    """(codes (I, O), zero points (G, O) of 1 and more, scales (G, O) in float16, group of each
    input).
    """
    values = W.double().numpy().T
    n_in, n_out = values.shape
    groups = np.arange(n_in) // (n_in if group_size == -1 else group_size)
    if order is not None:
        groups = groups[order.numpy()]
    most = 2**bits - 1
    codes = np.zeros((n_in, n_out), int)
    zeros = np.zeros((groups.max() + 1, n_out), int)
    scales = np.zeros((groups.max() + 1, n_out), np.float16)
    for g in range(len(zeros)):
        for o in range(n_out):
            own = values[groups == g, o]
            scale = np.float16(max(own.max(), 0) / most - min(own.min(), 0) / most + 1e-4)
            zero = min(max(round(-min(own.min(), 0) / float(scale)), 1), most)
            found = [min(max(round(v / float(scale)) + zero, 0), most) for v in own]
            codes[groups == g, o], zeros[g, o], scales[g, o] = found, zero, scale
    return codes, zeros, scales, groups


def meaning(codes: Any, zeros: Any, scales: Any, groups: Any) -> Tensor:
    """W (O, I) in float64."""
    n_in, n_out = codes.shape
    W = np.zeros((n_out, n_in))
    for o in range(n_out):
        for i, g in enumerate(groups):
            W[o, i] = float(scales[g, o]) * int(codes[i, o] - zeros[g, o])
    return torch.from_numpy(W)


def checkpoint(place: Path, name: str, kind: str, **options: Any) -> dict[str, Tensor]:
    """The folder of a tiny model (`llama`, `gpt2`) with the linears of its blocks packed as `kind`
    (gptq, awq); returns what they mean, by the names of their weights.
    """
    getattr(tiny, f"tiny_{name}")(place)
    config = json.loads((place / "config.json").read_text())
    told = {"quant_method": kind, "bits": 4, "group_size": 16, **options.pop("config", {})}
    if kind == "gptq":
        told |= {"desc_act": "order" in options, "sym": False}
    else:
        told |= {"version": "gemm", "zero_point": True}
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    tensors, means = load_file(place / "model.safetensors"), {}
    for key, W in list(tensors.items()):
        if W.ndim != 2 or (".h." not in key and ".layers." not in key):
            continue
        W_OI = W.T if name == "gpt2" else W
        if kind == "gptq":
            random = torch.Generator().manual_seed(len(means))
            acts = {"order": torch.randperm(W_OI.shape[1], generator=random)}
            new = gptq(
                W_OI, told["bits"], told["group_size"], **(acts if "order" in options else {})
            )
        else:
            new = awq(W_OI, told["group_size"])
        del tensors[key]
        tensors |= {key.replace("weight", part): t for part, t in new.tensors.items()}
        means[key] = new.W.T if name == "gpt2" else new.W
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return means
