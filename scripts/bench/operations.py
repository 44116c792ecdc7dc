"""Each operation of the adapter math on one frozen linear layer: our form, its reference, Hugging
Face peft's layer of the same method where there is one, and the layer with all its weights trained.

    python scripts/bench/operations.py [OPERATION ...] [--shapes 576x1536 1536x576] [--tokens 1024]
        [--dtype float32] [--rounds 25] [--threads N] [--json]

A pass is forward, the gradient of the input and those of the adapter. All forms take turns, and
what is printed is the median of their ratios to the frozen layer alone in the same round, and what
each saves for the backward pass beside parameters and the input. Masters stay in float32 where the
layer is narrower. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import Delta
from peftcli.core.graft import graft
from peftcli.core.site import Site
from peftcli.kernels import choice
from peftcli.methods.adapter import AdapterDelta
from peftcli.methods.boft import BOFT
from peftcli.methods.bottleneck_adapter import BottleneckAdapter
from peftcli.methods.compacter import Compacter
from peftcli.methods.dora import DoRA
from peftcli.methods.fourierft import FourierFT
from peftcli.methods.hut import HUT
from peftcli.methods.loha import LoHa
from peftcli.methods.lokr import LoKr
from peftcli.methods.lora import LoRA
from peftcli.methods.oft import OFT
from peftcli.methods.qwha import QWHA
from peftcli.methods.sparse import SparseDelta, random_positions
from peftcli.methods.ssf import SSF
from peftcli.methods.vera import Projections, VeRADelta
from peftcli.train import device as devices

Pass = Callable[[], None]


def compacter(site: Site, variant: Any) -> Delta:
    """An adapter of Kronecker products behind the layer."""
    method = Compacter(variant=variant, reduction_factor=16.0)
    held = nn.ModuleDict({"rule": method._rule()} if variant == "compacter" else {})
    return AdapterDelta(method._core(site.d_out, held))


def sparse(site: Site, share: float) -> Delta:
    """A share of the weight's entries, at random."""
    return SparseDelta(site, random_positions(site, int(share * site.d_in * site.d_out)))


DELTAS: dict[str, Callable[[Site], Delta]] = {
    "lora": lambda s: LoRA(r=16).build(s),
    "lora_dropout": lambda s: LoRA(r=16, dropout=0.05).build(s),
    "dora": lambda s: DoRA(r=16, dropout=0.0).build(s),
    "loha": lambda s: LoHa(r=8).build(s),
    "lokr": lambda s: LoKr(r=8).build(s),
    "oft": lambda s: OFT(block_size=32).build(s),
    "boft": lambda s: BOFT(block_size=4).build(s),
    "boft_2": lambda s: BOFT(block_size=8, n_butterfly=2).build(s),
    "fourierft": lambda s: FourierFT(n=1000).build(s),
    "hut": lambda s: HUT(r=8).build(s),
    "qwha": lambda s: QWHA(r_eq=16).build(s),
    "vera": lambda s: VeRADelta(s, Projections(256, s.d_in, s.d_out, 0), 0.1, 0.0),
    "sparse_0.2%": lambda s: sparse(s, 0.002),
    "sparse_2%": lambda s: sparse(s, 0.02),
    "ssf": lambda s: SSF().build(s),
    "bottleneck": lambda s: AdapterDelta(BottleneckAdapter().core(s.d_out, 0)),
    "compacter": lambda s: compacter(s, "compacter"),
    "phm": lambda s: compacter(s, "phm"),
}


def peft_config(name: str) -> Any:
    """Hugging Face peft's configuration of the same method, or None where it has none."""
    import peft

    at: Any = {"target_modules": ["layer"]}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=16, **at),
        "lora_dropout": lambda: peft.LoraConfig(r=16, lora_dropout=0.05, **at),
        "dora": lambda: peft.LoraConfig(r=16, use_dora=True, **at),
        "loha": lambda: peft.LoHaConfig(r=8, **at),
        "lokr": lambda: peft.LoKrConfig(r=8, **at),
        "oft": lambda: peft.OFTConfig(oft_block_size=32, r=0, use_cayley_neumann=True, **at),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, **at),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, **at),
        "hut": lambda: peft.HiraConfig(r=8, **at),
        "vera": lambda: peft.VeraConfig(r=256, **at),
        "sparse_2%": lambda: peft.ShiraConfig(r=8, **at),  # 8 (O + I) entries: 1.9 % of 576x1536
    }
    return makers[name]() if name in makers else None


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return self.layer(x)


def forms(name: str, layer: nn.Linear, with_peft: bool) -> dict[str, nn.Module]:
    """The layer frozen, trained whole, and under the operation in its forms."""
    site = Site("layer", layer, "linear", *reversed(weights.shape(layer)))
    delta = DELTAS[name](site).to(site.device)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.01 * torch.randn_like(p))
    ours = copy.deepcopy(layer)
    graft(ours, "default", delta)
    made: dict[str, nn.Module] = {
        "frozen": layer,
        "full": copy.deepcopy(layer).requires_grad_(True),
        "reference": ours,
        "ours": ours,
    }
    if with_peft and (config := peft_config(name)) is not None:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made["peft"] = peft.get_peft_model(One(copy.deepcopy(layer)), config)
    return {form: module.train() for form, module in made.items()}


def make_pass(form: str, module: nn.Module, x: Tensor, dy: Tensor) -> Pass:
    """Forward and backward of one form, in the operations' form that goes with it."""
    kernels = "reference" if form == "reference" else "auto"

    def run() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        with choice.using(kernels, x.device):
            module(x).backward(dy)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def saved(form: str, module: nn.Module, x: Tensor) -> int:
    """Bytes that a pass keeps for its backward part, beside parameters, buffers and the input."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = (t if t.layout == torch.strided else t._values()).untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with choice.using("reference" if form == "reference" else "auto", x.device), hooks:
        y = module(x)
    del y
    return sum(kept.values())


def measure(
    name: str, shape: tuple[int, int], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One row: the operation's forms on a layer of (inputs, outputs) = `shape`."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    layer = nn.Linear(*shape, bias=False).to(device, dtype).requires_grad_(False)
    x = torch.randn(4, args.tokens // 4, shape[0], device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(4, args.tokens // 4, shape[1], device=device, dtype=dtype)
    made = forms(name, layer, not args.without_peft)
    passes = {form: make_pass(form, module, x, dy) for form, module in made.items()}
    for run in passes.values():
        run(), run()  # the first ones warm up
    seconds: dict[str, list[float]] = {form: [] for form in passes}
    for _ in range(args.rounds):
        for form, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[form].append(time.perf_counter() - start)
    base = seconds["frozen"]
    ratios = {
        form: statistics.median(t / b for t, b in zip(times, base, strict=True))
        for form, times in seconds.items()
    }
    return {
        "operation": name,
        "shape": list(shape),
        "frozen_ms": 1e3 * statistics.median(base),
        "ratio": {form: r for form, r in ratios.items() if form != "frozen"},
        "saved_bytes": {form: saved(form, m, x) for form, m in made.items() if form != "frozen"},
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    packages = {}
    for package in ("torch", "triton", "peft", "transformers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": devices.describe(device),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": packages,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to the frozen layer, with the MiB saved behind them."""
    lines = [f"{'operation':14}{'layer':>11}{'frozen':>9}   ours (MiB)     reference      "
             "full           peft           speed against peft"]  # fmt: skip
    for row in rows:
        cells = ""
        for form in ("ours", "reference", "full", "peft"):
            ratio = row["ratio"].get(form)
            size = row["saved_bytes"].get(form, 0) / 2**20
            cells += "-".ljust(15) if ratio is None else f"{ratio:.2f} ({size:.1f})".ljust(15)
        gain = row["ratio"].get("peft", float("nan")) / row["ratio"]["ours"]
        speed = "-" if gain != gain else f"x{gain:.2f}"
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"{row['operation']:14}{shape:>11}{row['frozen_ms']:6.2f} ms   {cells}{speed}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=", ".join(DELTAS))
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1536x576"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=devices.num_cores())
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := [name for name in args.operations if name not in DELTAS]:
        parser.error(f"no operation {', '.join(unknown)}; there are {', '.join(DELTAS)}")
    torch.set_num_threads(args.threads)
    device = devices.pick()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        rows = [
            measure(name, shape, args, device)
            for shape in shapes
            for name in args.operations or DELTAS
        ]
    where = hardware(device)
    if args.json:
        print(json.dumps({"hardware": where, "args": vars(args), "rows": rows}, indent=2))
        return
    print(f"{args.tokens} tokens, {args.dtype}, {args.rounds} rounds; {where}")
    print(table(rows))


if __name__ == "__main__":
    main()
