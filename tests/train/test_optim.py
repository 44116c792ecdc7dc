"""What the optimizer's groups promise beyond torch."""

from __future__ import annotations

import pytest

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.methods.lora import LoRA
from peftcli.methods.p_tuning import PTuning
from peftcli.settings import Optimizer
from peftcli.train.optim import make_optimizer
from tests import tiny

SETTINGS = Optimizer("torch.optim.AdamW", 1e-3, 0.01, head_lr=5e-2)


def test_modules_that_train_whole_may_have_a_rate_of_their_own() -> None:
    host = Host(tiny.bert(), ["classifier"])
    host.add(LoRA(r=2, target_modules=("q",), modules_to_save=("pooler",)))
    groups = make_optimizer(SETTINGS, host.adapters["default"], host).param_groups
    rates = {p: g["lr"] for g in groups for p in g["params"]}
    bert = host.model
    heads = {*bert.classifier.parameters(), *bert.bert.pooler.parameters()}
    assert {p for p, lr in rates.items() if lr == 5e-2} == heads
    assert {p for p, lr in rates.items() if lr == 1e-3} == set(host.trained().values()) - heads
    decays = {p: g["weight_decay"] for g in groups for p in g["params"]}
    assert {p.ndim >= 2: decays[p] for p in rates} == {True: 0.01, False: 0.0}


def test_a_backbone_that_trains_keeps_its_own_rate_beside_the_heads() -> None:
    host = Host(tiny.bert(), ["classifier"])
    host.add(PTuning(tune_backbone=True, backbone_lr=1e-6))
    groups = make_optimizer(SETTINGS, host.adapters["default"], host).param_groups
    assert {g["lr"] for g in groups} == {5e-2, 1e-3, 1e-6}
    heads = {p for g in groups if g["lr"] == 5e-2 for p in g["params"]}
    assert heads == set(host.model.classifier.parameters())


def test_a_rate_for_heads_where_there_is_none_is_refused() -> None:
    host = Host(tiny.llama())
    host.add(LoRA(r=2))
    with pytest.raises(ConfigError, match=r"optimizer.head_lr=0.05: no module trains whole"):
        make_optimizer(SETTINGS, host.adapters["default"], host)
