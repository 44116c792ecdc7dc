"""Looking at the task before training: gradients of frozen weights, main directions of inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftcli.core.host import Host
from peftcli.core.principal import PrincipalInputs, leading, principal_inputs
from peftcli.core.scores import each_gradient, each_input, mean_gradients
from peftcli.core.site import find_sites
from peftcli.data.collate import make_collator
from peftcli.models.attention import use_packed_attention
from peftcli.train.preview import Preview
from tests import tiny
from tests.train.conftest import chats


def look(model: nn.Module, packing: bool = False) -> Preview:
    """The first batches of made-up chats for a decoder."""
    if packing:
        use_packed_attention(model)
    collate = make_collator("causal_lm", packing=packing)
    return Preview(model, "causal_lm", chats(22), collate, 4, 0, torch.device("cpu"))


def translations(model: nn.Module) -> Preview:
    """Sources and targets of different lengths for an encoder-decoder."""
    draw = np.random.default_rng(0)
    examples: Any = [
        {
            "id": str(i),
            "input_ids": draw.integers(10, 60, 3 + i % 4).astype(np.int32),
            "labels": draw.integers(10, 60, 2 + i % 5).astype(np.int32),
        }
        for i in range(8)
    ]
    collate = make_collator("seq2seq")
    return Preview(model, "seq2seq", examples, collate, 4, 0, torch.device("cpu"))


def dense_gradients(data: Preview, n: int) -> dict[str, Tensor]:
    """Mean gradients of all weights by plain autograd."""
    model = data.model.requires_grad_(True)
    for batch in data.batches(n):
        (data.loss(batch) / n).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.requires_grad_(False).zero_grad()
    return grads


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_mean_gradients_are_those_of_autograd(packing: bool) -> None:
    host = Host(tiny.models()["llama"]())
    data = look(host.model, packing)
    sites, _ = find_sites(host.model, host.layout, "all-linear")
    found = mean_gradients(host.model, sites, data, 3)
    wanted = dense_gradients(data, 3)
    for site in sites:
        torch.testing.assert_close(found[site.name], wanted[f"{site.path}.weight"])
    assert not any(p.requires_grad or p.grad is not None for p in host.model.parameters())


def test_a_role_of_a_fused_weight_gets_its_rows_of_the_gradient() -> None:
    host = Host(tiny.models()["gpt2"]())
    data = look(host.model)
    sites, _ = find_sites(host.model, host.layout, ["q", "v"])
    found = mean_gradients(host.model, sites, data, 2)
    wanted = dense_gradients(data, 2)
    for site in sites:
        G = wanted[f"{site.path}.weight"].T
        rows = torch.cat([G[a:b] for a, b in site.rows or ()])
        torch.testing.assert_close(found[site.name], rows)


def test_a_quantised_weight_has_a_gradient_too() -> None:
    host = Host(tiny.quantised(tiny.models()["llama"](), "nf4"))
    sites, _ = find_sites(host.model, host.layout, "q")
    shapes = []
    count = each_gradient(
        host.model, sites, look(host.model), 2, lambda site, G: shapes.append(G.shape)
    )
    assert count == 2
    assert shapes == [torch.Size([32, 32])] * 6


def test_inputs_are_shown_until_nobody_wants_more() -> None:
    host = Host(tiny.models()["llama"]())
    sites, _ = find_sites(host.model, host.layout, "q")
    seen: list[str] = []

    def consume(site: Any, x: Tensor, batch: Any) -> bool:
        seen.append(site.name)
        return len(seen) > 4

    assert each_input(host.model, sites, look(host.model), 5, consume) == 3
    assert each_input(host.model, sites, look(host.model), 5, lambda *_: None, lambda: True) == 1


def test_the_leading_part_is_that_of_the_svd() -> None:
    torch.manual_seed(0)
    M = torch.randn(60, 20) @ torch.diag(2.0 ** -torch.arange(20)) @ torch.randn(20, 50)
    for k in (3, 16):
        U, S, Vh = leading(M, k)
        exact = torch.linalg.svd(M, full_matrices=False)
        torch.testing.assert_close(S, exact.S[:k], rtol=1e-4, atol=1e-5)
        best = exact.U[:, :k] * exact.S[:k] @ exact.Vh[:k]
        torch.testing.assert_close(U * S @ Vh, best, rtol=1e-4, atol=1e-3)


def test_principal_inputs_of_many_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    X = torch.randn(90, 8) @ torch.randn(8, 8) + 3.0
    found = PrincipalInputs(8)
    for rows in X.split([5, 40, 2, 43]):
        found.add(rows)
        found.update()
    centred = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert found.seen == 90
    torch.testing.assert_close(found.S, S)
    torch.testing.assert_close((found.components * Vh).sum(1).abs(), torch.ones(8))
    torch.testing.assert_close(found.ratios, S.square() / centred.square().sum())
    torch.testing.assert_close(found.ratios.sum(), torch.tensor(1.0))


def test_similarity_is_one_when_nothing_new_comes() -> None:
    torch.manual_seed(0)
    X, found = torch.randn(40, 6) * torch.tensor([9.0, 5, 3, 1, 1, 1]), PrincipalInputs(3)
    for expected in (torch.zeros(3), torch.ones(3)):
        found.add(X)
        found.update()
        torch.testing.assert_close(found.similarity, expected, atol=1e-4, rtol=0)


def run(host: Host, data: Preview, targets: list[str]) -> dict[str, PrincipalInputs]:
    sites, _ = find_sites(host.model, host.layout, targets)
    counts = {site.name: 2 for site in sites}
    return principal_inputs(host, sites, data, 2, counts, lambda _: False)


def test_sites_with_the_same_input_share_their_directions() -> None:
    host = Host(tiny.models()["llama"]())
    found = run(host, look(host.model), ["q", "k", "v", "gate", "up", "down"])
    first = "model.layers.0."
    q, gate = found[f"{first}self_attn.q_proj"], found[f"{first}mlp.gate_proj"]
    assert found[f"{first}self_attn.v_proj"] is q
    assert found[f"{first}mlp.up_proj"] is gate
    assert len({id(p) for p in found.values()}) == 3 * 3


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_only_tokens_that_answer_for_a_target_count(packing: bool) -> None:
    host = Host(tiny.models()["llama"]())
    found = run(host, look(host.model, packing), ["q"])
    assert {p.seen for p in found.values()} == {8 * 2}  # two targets an example


def test_an_encoder_counts_its_own_tokens_and_cross_attention_reads_them() -> None:
    host = Host(tiny.models()["t5"]())
    data = translations(host.model)
    found = run(host, data, ["q", "k"])
    batches = list(data.batches(2))
    source = sum(int(b.inputs["attention_mask"].sum()) for b in batches)
    target = sum(b.num_targets for b in batches)
    for name, p in found.items():
        reads_source = "encoder." in name.split("block")[0] or name.endswith("EncDecAttention.k")
        assert p.seen == (source if reads_source else target), name
    cross = [p for name, p in found.items() if name.endswith("EncDecAttention.k")]
    assert cross[0] is cross[1]
