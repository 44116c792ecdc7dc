"""What HFT promises: two of four, one or two of three, one of two, in every block; counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.export import adapter
from peftcli.methods.full import Full
from peftcli.methods.hft import HFT, half_reset
from peftcli.models.load import empty_model
from tests import tiny
from tests.conftest import Cli
from tests.train.conftest import MakeLoop, make_loop, one_thread  # noqa: F401  (fixtures)

LLAMA_2_7B = LlamaConfig(intermediate_size=11008, tie_word_embeddings=False)


def halves(layers: int, draws: int, **options: object) -> list[set[str]]:
    """Draws of a Llama with `layers` blocks."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2
    )
    host = Host(empty_model(config, "causal_lm"))
    return [HFT(seed=seed, **options).drawn(host, 0) for seed in range(draws)]


@pytest.mark.parametrize("layers", [4, 5])
def test_every_block_trains_two_of_four_one_of_two_and_one_or_two_of_three(layers: int) -> None:
    twos = set()
    for names in halves(layers, 12):
        count = Counter(
            (n.split(".")[2], n.split(".")[3].split("_")[-1]) for n in names if "layers" in n
        )
        assert all(count[str(i), "attn"] == 2 for i in range(layers))
        assert all(count[str(i), "layernorm"] == 1 for i in range(layers))
        ffn = [count[str(i), "mlp"] for i in range(layers)]
        assert set(ffn) == {1, 2}
        twos.add(ffn.count(2))
    assert twos == {layers // 2, layers - layers // 2}


def test_every_matrix_is_drawn_half_of_the_time() -> None:
    draws = halves(3, 400, embed_head="frozen")
    count = Counter(n for names in draws for n in names)
    assert len(count) == 3 * 9
    assert all(150 < n < 250 for n in count.values())  # five deviations


@pytest.mark.parametrize(
    ("embed_head", "count"), [("frozen", 3_238_133_760), ("trained", 3_500_281_856)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_parameters_of_llama_2_7b(embed_head: str, count: int, seed: int) -> None:
    host = Host(empty_model(LLAMA_2_7B, "causal_lm"))
    host.add(HFT(embed_head=embed_head, seed=seed))
    assert host.num_parameters()[0] == count


def test_parameters_of_llama_2_7b_by_category() -> None:
    host = Host(empty_model(LLAMA_2_7B, "causal_lm"))
    host.add(HFT(embed_head="frozen"))
    sizes = Counter()
    for name, p in host.trained().items():
        sizes["norm" if "norm" in name else "ffn" if "mlp" in name else "attention"] += p.numel()
    assert sizes == {"attention": 1_073_741_824, "ffn": 2_164_260_864, "norm": 131_072}
    blocks = sum(p.numel() for n, p in host.model.named_parameters() if "layers" in n)
    assert blocks == 6_476_267_520 == 2 * sizes.total()


def test_with_grouped_queries_the_count_depends_on_the_draw() -> None:
    config = tiny.models()["llama"]().config  # k and v are half as wide as q and o
    counts = set()
    for seed in range(6):
        host = Host(empty_model(config, "causal_lm"))
        host.add(HFT(embed_head="frozen", seed=seed))
        counts.add(host.num_parameters()[0])
    assert len(counts) > 1


@pytest.mark.parametrize(("ratio", "trained"), [(0.25, 1), (0.75, 3)])
def test_another_share_of_every_category(ratio: float, trained: int) -> None:
    for names in halves(4, 3, ratio=ratio, embed_head="frozen"):
        attention = Counter(n.split(".")[2] for n in names if "self_attn" in n)
        assert set(attention.values()) == {trained}
        assert sum("mlp" in n for n in names) == 4 * trained * 3 // 4


def test_a_file_lists_what_trained_and_the_seed(tmp_path: Path) -> None:
    host = Host(tiny.models()["llama"]())
    host.add(HFT(seed=5))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    drawn = HFT(seed=5).drawn(host, 0)
    assert set(load_file(tmp_path / adapter.WEIGHTS)) == drawn
    assert adapter.read_config(tmp_path)["method"]["seed"] == 5


def test_half_of_the_ends_is_one_of_embeddings_and_head() -> None:
    draws = halves(2, 20, embed_head="half")
    ends = [names & {"model.embed_tokens.weight", "lm_head.weight"} for names in draws]
    assert {len(e) for e in ends} == {1}
    assert len({next(iter(e)) for e in ends}) == 2
    assert all("model.norm.weight" in names for names in draws)


def test_the_same_seed_draws_the_same_and_another_stage_does_not() -> None:
    host = Host(tiny.models()["llama"]())
    assert HFT(seed=3).drawn(host, 0) == HFT(seed=3).drawn(host, 0)
    assert HFT(seed=3).drawn(host, 0) != HFT(seed=3, stage=1).drawn(host, 0)


def test_layers_are_drawn_whole_and_a_model_s_tensors_anyhow() -> None:
    (names,) = halves(4, 1, granularity="layer", embed_head="frozen")
    assert Counter(n.split(".")[2] for n in names).most_common() == [
        (i, 9) for i in dict.fromkeys(n.split(".")[2] for n in names)
    ]
    assert len(names) == 2 * 9
    (names,) = halves(4, 1, granularity="model", embed_head="frozen")
    assert len(names) == 4 * 9 // 2


@pytest.mark.parametrize("model", sorted(tiny.models()))
def test_all_of_it_is_full_fine_tuning(model: str) -> None:
    host, full = Host(tiny.models()[model]()), Host(tiny.models()[model]())
    host.add(HFT(ratio=1.0))
    full.add(Full())
    assert host.selected == full.selected


def test_t5_halves_self_and_cross_attention_apart() -> None:
    host = Host(tiny.models()["t5"]())
    names = HFT().drawn(host, 0)
    for kind in ("0.SelfAttention", "1.EncDecAttention"):
        for i in range(2):
            place = f"decoder.block.{i}.layer.{kind}."
            assert len([n for n in names if n.startswith(place) and "relative" not in n]) == 2


@pytest.mark.parametrize("resample", ["epoch", "steps"])
def test_a_new_period_draws_anew_and_forgets_what_leaves(resample: str) -> None:
    host = Host(tiny.models()["llama"]())
    method = HFT(resample=resample, resample_steps=5)
    host.add(method)
    seen = []
    for step in range(10):
        method.before_step(host, Step(step, 10, step / 5))
        seen.append(set(host.trained()))
        left = {
            n for n, p in host.model.named_parameters() if any(p is q for q in host.reset_requests)
        }
        assert left == (seen[-2] if step else set(host.selected)) - seen[-1]
        host.reset_requests.clear()
    assert seen[0] == seen[4] != seen[5] == seen[9]
    assert seen[0] == method.drawn(host, 0)


@pytest.mark.parametrize("resample", ["stage", "steps"])
def test_what_rests_stays_bit_for_bit(resample: str, make_loop: MakeLoop, tmp_path: Path) -> None:  # noqa: F811
    method = HFT(resample=resample, resample_steps=2)
    loop = make_loop(folder=tmp_path / "run", method=method, max_steps=2)
    loop.fit()
    base = dict(tiny.models()["llama"]().named_parameters())
    for name, p in loop.host.model.named_parameters():
        assert torch.equal(p, base[name]) != (name in method.drawn(loop.host, 0)), name


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_half_reset_keeps_exactly_the_chosen_part(model: str) -> None:
    host, base = Host(tiny.models()[model]()), tiny.models()[model]()
    with torch.no_grad():
        for p in host.model.parameters():
            p.add_(1.0)
    tuned = {n: p.clone() for n, p in host.model.named_parameters()}
    back = half_reset(host, base, seed=3)
    kept = HFT(seed=3).drawn(host, 0)
    assert kept | set(back) == set(tuned)
    assert not kept & set(back)
    for name, p in host.model.named_parameters():
        whole = tuned[name] if name in kept else base.get_parameter(name)
        assert torch.equal(p, whole), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_exported_model_has_half_of_its_tensors_from_the_base(
    method: str, cli: Cli, tiny_run: list[str], models: Path, tmp_path: Path
) -> None:
    words = [word for word in tiny_run if not word.startswith("method.")]
    run = [*words, f"method={method}", "trainer.max_steps=3", "optimizer.lr=1e-2"]
    cli("train", *run, *(["method.target_modules=all-linear"] if method == "lora" else []))
    told = cli("export", "run", "--half-reset", 1, "--output", "mixed", "--json").stdout
    mixed, base = (
        load_file(tmp_path / "mixed/model.safetensors"),
        load_file(models / "llama/model.safetensors"),
    )
    same = {n for n in base if n in mixed and torch.equal(mixed[n], base[n])}
    linears = [n for n in base if n.endswith("proj.weight")]
    assert json.loads(told)["tensors_reset"] == 3 * 2 + 4 + 1 + 3  # of attention, ffn, norms
    assert 0 < len(same & set(linears)) < len(linears)
    for i in range(3):
        mine = {n for n in linears if f".{i}.self_attn" in n}
        assert len(mine & same) == 2
    said = cli("export", "run", "--half-reset", "--to", "adapter", "--output", "x", code=2).stderr
    assert "--half-reset goes with --to merged" in said
