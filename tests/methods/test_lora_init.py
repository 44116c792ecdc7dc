"""Where LoRA starts: worked numbers, identities and peft's own results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from peftcli import config
from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.scores import mean_gradients
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.lora import LoRA, LoRADelta
from peftcli.methods.lora_data_init import allot, lora_ga, lora_one
from peftcli.methods.lora_init import loftq
from tests import tiny
from tests.core.test_scores import look

NF4 = """-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0 .0795803 .1609302 .2461123
.3379152 .4407098 .5626170 .7229568 1"""


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    return Site("m", module, weights.kind_of(module), d_in, d_out)


def started(method: LoRA, model: str = "llama") -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]())
    host.add(method, data=look(host.model))
    return host


def outputs(model: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.batch(name)).logits


def nf4(W: Tensor) -> Tensor:
    """Blocks of 64 by their largest absolute value, on the 16 levels."""
    levels = torch.tensor([float(x) for x in NF4.split()])
    blocks = W.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).view_as(W)


# -- without data ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "init", ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"]
)
def test_a_start_without_data_leaves_the_function(init: str) -> None:
    targets = ("all-linear", "embed") if init in ("default", "gaussian") else "all-linear"
    host = started(LoRA(r=4, init=init, target_modules=targets))
    ours, base = outputs(host.model), outputs(tiny.models()["llama"]())
    if init in ("default", "gaussian"):  # B = 0, or A = 0 of an embedding: to the last bit
        assert torch.equal(ours, base)
    torch.testing.assert_close(ours, base, atol=1e-5, rtol=1e-5)
    alive = any(d.B.any() for site, d in host.deltas() if site.kind == "linear")
    assert alive == (init not in ("default", "gaussian"))


def test_more_power_iterations_come_nearer_to_the_exact_start() -> None:
    torch.manual_seed(0)
    U, Vh = (torch.linalg.qr(torch.randn(n, 40)).Q.T for n in (40, 48))
    linear = nn.Linear(48, 40)
    linear.weight.data = U.T * 0.8 ** torch.arange(40) @ Vh
    site = site_of(linear)
    exact = LoRA(r=4, init="pissa").build(site)
    errors = []
    for niter in (1, 3, 30):
        torch.manual_seed(1)
        fast = LoRA(r=4, init=f"pissa_niter_{niter}").build(site)
        errors.append((fast.B @ fast.A - exact.B @ exact.A).norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("method", ["lora.LoRA", "dora.DoRA"])
@pytest.mark.parametrize("init", ["pissa_niter_0", "pissa_niter_", "pisa"])
def test_a_misspelt_start_is_refused_and_any_number_of_iterations_taken(
    method: str, init: str
) -> None:
    fields = {"_target_": f"peftcli.methods.{method}"}
    with pytest.raises(ConfigError, match=r"init=.*takes default \| .* Did you mean pissa\?"):
        config.method_of({**fields, "init": init})
    assert config.method_of({**fields, "init": "pissa_niter_7"}).init == "pissa_niter_7"


# -- orthogonal ------------------------------------------------------------------------------------
def test_orthogonal_factors_are_alive_and_multiply_to_nothing() -> None:
    torch.manual_seed(0)
    delta = LoRA(r=6, init="orthogonal").build(site_of(nn.Linear(20, 12)))
    torch.testing.assert_close(delta.B @ delta.A, torch.zeros(12, 20), atol=1e-7, rtol=0)
    assert torch.linalg.matrix_rank(delta.A) == torch.linalg.matrix_rank(delta.B) == 3
    with pytest.raises(ConfigError, match="even rank"):
        LoRA(r=5, init="orthogonal").build(site_of(nn.Linear(20, 12)))


# -- EVA -------------------------------------------------------------------------------------------
def test_eva_allots_the_worked_ranks() -> None:
    ratios = {"a": torch.tensor([0.5, 0.3, 0.25, 0.05]), "b": torch.tensor([0.2, 0.15, 0.01, 1e-3])}
    assert allot(ratios, dict.fromkeys("ab", 4), 4) == {"a": 3, "b": 1}
    assert allot(ratios, dict.fromkeys("ab", 2), 4) == {"a": 2, "b": 2}


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_eva_keeps_the_budget_and_starts_at_the_base_with_orthonormal_rows(model: str) -> None:
    host = started(LoRA(r=4, alpha=6.0, init="eva", target_modules=("q", "v", "down")), model)
    ranks = [len(d.A) for _, d in host.deltas()]
    sites = len(host.find(("q", "v", "down")))
    assert sum(ranks) == 4 * sites
    for _, delta in host.deltas():
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A)), atol=1e-5, rtol=0)
        assert delta.scale == pytest.approx(6.0 / 4)
    assert torch.equal(outputs(host.model, model), outputs(tiny.models()[model](), model))


def test_evas_ranks_and_sites_left_out_are_in_the_file(tmp_path: Path) -> None:
    targets, out = ("q", "down"), "model.layers.1.self_attn.q_proj"
    method = LoRA(r=2, init="eva", rank_pattern={out: 0}, target_modules=targets)
    host, again, read = (started(method), *(Host(tiny.models()["llama"]()) for _ in range(2)))
    assert out not in {site.name for site, _ in host.deltas()}
    written = method.published(host, "default")
    assert written.init == "default"
    assert written.rank_pattern[out] == 0
    with torch.no_grad():
        for _, delta in host.deltas():
            delta.B.normal_()
    again.add(written)
    again.load_state(host.state())
    assert [d.scale for _, d in again.deltas()] == [d.scale for _, d in host.deltas()]
    torch.testing.assert_close(outputs(again.model), outputs(host.model))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    adapter.load(read, tmp_path)
    torch.testing.assert_close(outputs(read.model), outputs(host.model))
    theirs = peft.PeftModel.from_pretrained(tiny.models()["llama"](), tmp_path)
    torch.testing.assert_close(outputs(theirs), outputs(host.model), atol=2e-6, rtol=1e-5)


def test_evas_options_whiten_and_leave_alpha() -> None:
    targets = ("q", "down")
    plain = started(LoRA(r=2, alpha=4.0, init="eva", target_modules=targets))
    other = started(
        LoRA(r=2, alpha=4.0, init="eva", target_modules=targets, whiten=True, adjust_scaling=False)
    )
    for (_, a), (_, b) in zip(plain.deltas(), other.deltas(), strict=True):
        assert b.scale == 4.0 / len(b.A)
        cosine = torch.cosine_similarity(a.A, b.A).abs()
        torch.testing.assert_close(cosine, torch.ones(len(a.A)), atol=1e-4, rtol=0)
        assert (b.A.norm(dim=1).diff() > -1e-6).all()  # the larger the singular value, the shorter


@pytest.mark.parametrize("whiten", [False, True])
def test_evas_rows_are_the_principal_inputs_over_their_deviations(whiten: bool) -> None:
    host, rows = Host(tiny.models()["llama"]()), []
    data, q = look(host.model), host.model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = q.register_forward_hook(lambda _, x, y: rows.append(x[0]))
    (batch,) = data.batches(1)  # of more the main directions are kept, and no others
    data.forward(batch)
    hook.remove()
    X = rows[0][data.tokens(batch)]
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    method = LoRA(
        r=3, init="eva", rho=1.0, tau=1.0, init_batches=1, whiten=whiten, target_modules=("q",)
    )
    host.add(method, data=data)
    A = next(delta.A for _, delta in host.deltas())
    aligned = A * (A * Vh[:3]).sum(1, keepdim=True).sign()
    wanted = Vh[:3] / S[:3, None].sqrt() if whiten else Vh[:3]
    torch.testing.assert_close(aligned, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tau", "stops"), [(1e-6, True), (1.0, False)])
def test_eva_looks_until_its_components_are_within_tau_of_the_last(tau: float, stops: bool) -> None:
    host = Host(tiny.models()["llama"]())
    data, drawn = look(host.model), []
    forward = data.forward

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(data, name)

        def forward(self, batch: Any) -> None:
            drawn.append(batch)
            forward(batch)

    host.add(LoRA(r=2, init="eva", tau=tau, target_modules=("q",)), data=Counted())
    every = sum(1 for _ in data.batches(1000))
    assert len(drawn) == (2 if stops else every)
    assert every > 2


def test_eva_reads_linear_layers_and_enough_tokens() -> None:
    with pytest.raises(ConfigError, match="linear layers"):
        started(LoRA(init="eva", target_modules=("embed",)))
    with pytest.raises(ConfigError, match="fewer than 16 tokens"):
        started(LoRA(r=8, init="eva", init_batches=1))


# -- LoRA-GA and LoRA-One --------------------------------------------------------------------------
def test_lora_ga_is_stable_and_starts_at_the_base() -> None:
    host = started(LoRA(r=4, init="lora_ga", target_modules=("q", "down")))
    for site, delta in host.deltas():
        wanted = math.sqrt(site.d_out) / 16 * torch.eye(4)
        torch.testing.assert_close(delta.A @ delta.A.T, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(delta.B.T @ delta.B, wanted, atol=1e-5, rtol=1e-5)
    base = outputs(tiny.models()["llama"]())
    torch.testing.assert_close(outputs(host.model), base, atol=1e-5, rtol=1e-5)


def layer_and_gradient() -> tuple[nn.Linear, Tensor]:
    """A gradient (16, 20) whose singular values fall fast, so that peft's random SVD finds them."""
    torch.manual_seed(1)
    U, Vh = (torch.linalg.qr(torch.randn(n, 16)).Q.T for n in (16, 20))
    return nn.Linear(20, 16, bias=False), U.T * 3.0 ** -torch.arange(16) @ Vh


def ga(**options: Any) -> tuple[LoRADelta, Tensor, Tensor, Tensor]:
    linear, G = layer_and_gradient()
    method = LoRA(r=3, alpha=6.0, init="lora_ga", **options)
    delta = LoRADelta(site_of(linear), 3, 2.0)
    lora_ga(method, delta, site_of(linear), G)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return delta, U, Vh, linear.weight.detach()


@pytest.mark.parametrize(
    ("direction", "a", "b"),
    [
        ("ArB2r", [0, 1, 2], [3, 4, 5]),
        ("A2rBr", [3, 4, 5], [0, 1, 2]),
        ("ArBr", [1, 3, 5], [0, 2, 4]),
    ],
)
def test_lora_ga_takes_the_directions_named(direction: str, a: list[int], b: list[int]) -> None:
    delta, U, Vh, _ = ga(direction=direction, ga_scale="unit")
    torch.testing.assert_close((delta.A @ Vh[a].T).abs(), torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close((delta.B.T @ U[:, b]).abs(), torch.eye(3), atol=1e-5, rtol=0)


def test_random_directions_of_lora_ga_are_all_of_the_first_2r() -> None:
    delta, U, Vh, _ = ga(direction="random", ga_scale="unit")
    rows = (delta.A @ Vh.T).abs().argmax(1).tolist()
    columns = (delta.B.T @ U).abs().argmax(1).tolist()
    assert sorted(rows + columns) == list(range(6))


def test_lora_gas_scales_are_on_both_factors() -> None:
    W = ga()[3]
    mean = (torch.linalg.svdvals(W)[:3] / 2.0).sqrt().mean().item()
    for scale, c in {"unit": 1.0, "gd_scale": 0.5, "weight_svd": mean, "stable": 0.5}.items():
        delta = ga(ga_scale=scale)[0]  # 16^(1/4) / sqrt(16) = 0.5
        for norms in (delta.A.norm(dim=1), delta.B.norm(dim=0)):
            torch.testing.assert_close(norms, torch.full((3,), c))


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_in_pefts_form_is_pefts(direction: str) -> None:
    delta = ga(direction=direction, ga_scale="peft")[0]
    linear, linear._peft_loraga_grad = layer_and_gradient()
    options = peft.LoraGAConfig(direction=direction, scale="stable", stable_gamma=16)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=options,
    )
    theirs = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    A, B = (f["default"].weight for f in (theirs.lora_A, theirs.lora_B))
    for ours, stock in ((delta.A, A), (delta.B.T, B.T)):  # up to the signs of singular vectors
        aligned = stock * (ours * stock).sum(1, keepdim=True).sign()
        torch.testing.assert_close(ours, aligned, atol=1e-5, rtol=1e-4)


def test_lora_one_starts_at_the_best_part_of_a_gradient_step() -> None:
    torch.manual_seed(2)
    G, linear = torch.randn(12, 10), nn.Linear(10, 12)
    delta = LoRADelta(site_of(linear), 3, 1.5)
    lora_one(LoRA(r=3, init="lora_one"), delta, site_of(linear), G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    step = -1.5 / (128 * S[0]) * (U[:, :3] * S[:3] @ Vh[:3])
    torch.testing.assert_close(delta.delta(linear.weight), step, atol=1e-7, rtol=1e-5)
    assert delta.A0 is None


def test_lora_one_and_loftq_alone_do_not_promise_to_start_at_the_base() -> None:
    elsewhere = {
        init
        for choice in get_args(get_type_hints(LoRA)["init"])
        for init in get_args(choice)
        if not LoRA(init=init).starts_at_base
    }
    assert elsewhere == {"lora_one", "loftq"}
    host = Host(tiny.models()["llama"]())
    data, (x, layer) = look(host.model), (torch.randn(3, 32), "model.layers.0.self_attn.q_proj")
    base = host.model.get_submodule(layer)(x)
    host.add(LoRA(r=2, init="lora_one", target_modules=("q",)), data=data)
    delta = next(delta for site, delta in host.deltas() if site.path == layer)
    moved = delta.scale * x @ delta.A.T @ delta.B.T
    torch.testing.assert_close(host.model.get_submodule(layer)(x) - base, moved)
    assert moved.abs().max() > 1e-6


def test_lora_one_descends_the_loss_of_the_data_it_saw() -> None:
    method = LoRA(r=8, init="lora_one", alpha=16.0, use_rslora=True, target_modules="all-linear")
    host = Host(tiny.models()["llama"]())
    data = look(host.model)
    batch = next(data.batches(1))
    before = data.loss(batch).item()
    host.add(method, data=data)
    assert data.loss(batch).item() < before


def test_gradient_starts_read_the_batches_they_are_told_to() -> None:
    host = Host(tiny.models()["llama"]())
    data = look(host.model)
    host.add(LoRA(r=2, init="lora_one", init_batches=2, target_modules=("q",)), data=data)
    (site, delta), *_ = host.deltas()
    with host.disabled():
        G = mean_gradients(host.model, [site], data, 2)[site.name]
    U, S, Vh = torch.linalg.svd(G)
    wanted = -delta.scale / (128 * S[0]) * (U[:, :2] * S[:2] @ Vh[:2])
    torch.testing.assert_close(delta.delta(site.weight), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_start_from_gradients_crosses_to_stock_peft(init: Any, tmp_path: Path) -> None:
    host = started(LoRA(r=2, init=init))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()["llama"](), tmp_path)
    torch.testing.assert_close(outputs(theirs), outputs(host.model), atol=2e-6, rtol=1e-5)
    again = Host(tiny.models()["llama"]())
    again.add(LoRA(r=2, init=init))  # without data: the places of what the state holds
    again.load_state(host.state())
    torch.testing.assert_close(outputs(again.model), outputs(host.model))


# -- LoftQ -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rounds", [1, 5])
def test_loftq_is_nearer_to_the_weight_than_its_quantisation(scale: float, rounds: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 128)
    Q, A, B = loftq(W, nf4, 8, scale, rounds)
    assert (W - Q - scale * B @ A).norm() < 0.95 * (W - nf4(W)).norm()
    assert torch.equal(Q, nf4(W)) == (rounds == 1)


def test_more_rounds_of_loftq_come_nearer() -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 128)
    errors = [
        (W - Q - B @ A).norm() for Q, A, B in (loftq(W, nf4, 8, 1.0, rounds) for rounds in (1, 5))
    ]
    assert errors[1] < errors[0]


def quantised(folder: Path, kind: str) -> tuple[Host, dict[str, Tensor]]:
    original = LlamaForCausalLM.from_pretrained(folder)
    state = {n: t.clone() for n, t in original.state_dict().items()}
    return Host(tiny.quantised(original, kind)), state


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, at every 8-bit product
@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_fits_the_weights_that_a_base_was_quantised_from(
    kind: str, bits: Any, rounds: int, tmp_path: Path
) -> None:
    tiny.tiny_llama(tmp_path)
    host, state = quantised(tmp_path, kind)
    before = {s.name: s.weight.float().clone() for s in host_sites(host)}
    host.add(LoRA(r=8, init="loftq", loftq_bits=bits, loftq_iter=rounds))
    for site, delta in host.deltas():
        W, Q = state[f"{site.path}.weight"], site.weight.float()
        assert (W - Q - delta.delta(W)).norm() < 0.95 * (W - before[site.name]).norm()
        assert torch.equal(Q, before[site.name]) == (rounds == 1)
    assert outputs(host.model).isfinite().all()


def host_sites(host: Host) -> list[Site]:
    from peftcli.core.site import find_sites

    return find_sites(host.model, host.layout, ("q", "v"))[0]


def test_loftq_of_several_rounds_comes_back_from_its_file(tmp_path: Path) -> None:
    tiny.tiny_llama(tmp_path / "base")
    host, _ = quantised(tmp_path / "base", "nf4")
    host.add(LoRA(r=4, init="loftq", loftq_iter=2))
    adapter.save(host, "default", tmp_path / "a", "causal_lm", "base")
    again, _ = quantised(tmp_path / "base", "nf4")
    adapter.load(again, tmp_path / "a")
    assert torch.equal(outputs(again.model), outputs(host.model))


def test_loftq_without_a_quantised_base_or_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a base in 4 bits"):
        Host(tiny.models()["llama"]()).add(LoRA(init="loftq"))
    host = Host(tiny.quantised(tiny.models()["llama"](), "nf4"))
    with pytest.raises(ConfigError, match="needs the weights that the base was quantised from"):
        host.add(LoRA(init="loftq"))
