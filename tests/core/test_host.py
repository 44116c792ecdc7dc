"""What the host promises of adding and removing adapters."""

from __future__ import annotations

import torch

from peftcli.core.host import Host
from peftcli.methods.bitfit import BitFit
from peftcli.methods.lora import LoRA
from peftcli.methods.partial import Partial
from tests import tiny


def test_what_a_removed_adapter_alone_trained_rests_with_its_values() -> None:
    host = Host(tiny.bert(), ["classifier"])
    heads = dict(host.trained())
    host.add(Partial(preset="layernorm", modules_to_save=("pooler",)), "norms")
    host.add(BitFit(), "biases")
    both, norm = host.selected, "bert.embeddings.LayerNorm"
    host.model(**tiny.batch("bert")).loss.backward()
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(1.0)
    values = {n: p.clone() for n, p in host.model.named_parameters()}
    host.remove("norms")
    assert set(both) - set(host.selected) == {n for n in both if n.endswith("weight")} - set(heads)
    assert set(host.trained()) == set(host.selected) == set(host.state())
    assert f"{norm}.bias" in host.trained()
    assert host.model.get_parameter(f"{norm}.weight").grad is None
    assert host.saved_modules == ("classifier",)
    host.remove("biases")
    assert set(host.trained()) == set(heads)
    assert all(torch.equal(p, values[n]) for n, p in host.model.named_parameters())


def test_a_module_that_two_adapters_train_whole_trains_until_both_are_gone() -> None:
    host = Host(tiny.bert())
    for name in ("one", "two"):
        host.add(LoRA(target_modules="q", modules_to_save=("pooler",)), name)
    host.remove("one")
    assert host.saved_modules == ("bert.pooler",)
    assert "bert.pooler.dense.weight" in host.trained()
    host.remove("two")
    assert not host.saved_modules
    assert not host.trained()
