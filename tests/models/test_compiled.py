"""Compiled blocks train as plain ones do, and are compiled once for rows of every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from peftcli.core.host import Host
from peftcli.data.collate import Batch, causal_collator
from peftcli.methods.lora import LoRA
from peftcli.models.attention import use_packed_attention
from peftcli.models.compiled import compile_blocks, uncompiled
from tests import tiny


def packed(*lengths: int) -> Batch:
    draw = np.random.default_rng(0)
    rows = [
        {"id": i, "input_ids": draw.integers(3, 60, n, dtype=np.int32)}
        for i, n in enumerate(lengths)
    ]
    for row in rows:
        row["supervised"] = np.ones(len(row["input_ids"]), bool)
    return causal_collator(0, packing=True)(rows)


def gradients(host: Host, batch: Batch) -> dict[str, Tensor]:
    host.model.zero_grad()
    host.model(**batch.inputs).logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in host.trained().items()}


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_packed_rows_of_every_layout_share_what_was_compiled() -> None:
    host = Host(tiny.llama())
    host.add(LoRA(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_(std=0.1)
    use_packed_attention(host.model)
    host.model.train()
    layouts = [packed(9, 14), packed(5, 8, 13), packed(3, 4, 5, 6)]
    plain = [gradients(host, batch) for batch in layouts]
    torch._dynamo.reset()
    counters.clear()
    assert compile_blocks(host.model, host.layout, backend="aot_eager") == 2
    made = []
    for batch, wanted in zip(layouts, plain, strict=True):
        for name, grad in gradients(host, batch).items():
            torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-4)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] > 0
    assert made[0] == made[-1]
    with torch.no_grad(), uncompiled():
        host.model.eval()(input_ids=torch.ones(2, 7, dtype=torch.long))
    assert counters["stats"]["unique_graphs"] == made[-1]


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_dropout_draws_alike_where_blocks_are_compiled() -> None:
    host = Host(tiny.llama())
    host.add(LoRA(r=4, target_modules="all-linear", dropout=0.5))
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_(std=0.1)
    use_packed_attention(host.model)
    host.model.train()
    batch = packed(9, 14)
    torch.manual_seed(3)
    plain = gradients(host, batch)
    torch._dynamo.reset()
    compile_blocks(host.model, host.layout, backend="aot_eager")
    torch.manual_seed(3)
    for name, grad in gradients(host, batch).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4)
