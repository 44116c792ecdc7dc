"""What partial fine-tuning promises: the tensors of each preset, counts, rows, peft's norms."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from peftcli.core.host import Host
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.partial import Partial
from peftcli.models.load import empty_model
from tests import tiny
from tests.conftest import Cli
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture

LLAMA_2_7B = LlamaConfig(intermediate_size=11008, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("config", "preset", "count"),
    [
        (LLAMA_2_7B, "last_layer", 202_383_360),
        (LLAMA_2_7B, "embed_head", 262_144_000),
        (LLAMA_2_7B, "layernorm", 266_240),
        (LLAMA_2_7B, "attention", 32 * 4 * 4096**2),
        (GPT2Config(), "embed_head", 38_597_376),
        (GPT2Config(), "layernorm", 38_400),
    ],
)
def test_parameters(config: object, preset: str, count: int) -> None:
    host = Host(empty_model(config, "causal_lm"))
    host.add(Partial(preset=preset))
    assert host.num_parameters()[0] == count


def test_positions_can_be_chosen_beside_the_tied_embeddings() -> None:
    host = Host(empty_model(GPT2Config(), "causal_lm"))
    host.add(Partial(modules=(r".*\.wte\.weight", r".*\.wpe\.weight")))
    assert host.num_parameters()[0] == 38_597_376 + 786_432


def test_the_last_layer_of_bart_is_the_decoders() -> None:
    config = BartConfig(encoder_layers=12, decoder_layers=12)
    host = Host(empty_model(config, "seq2seq"))
    host.add(Partial())
    assert {n.partition("layers.11.")[0] for n in host.selected} == {"model.decoder."}


def test_norms_of_queries_and_keys_train_on_request() -> None:
    config = Qwen3Config(num_hidden_layers=2)
    counts = []
    for include in (False, True):
        host = Host(empty_model(config, "causal_lm"))
        host.add(Partial(preset="layernorm", include_qk_norm=include))
        counts.append(len(host.selected))
    assert counts == [5, 9]


@pytest.mark.parametrize("model", sorted(tiny.models()))
@pytest.mark.parametrize("preset", ["last_layer", "embed_head", "layernorm", "attention"])
def test_exactly_what_is_chosen_changes_in_a_step(model: str, preset: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(Partial(preset=preset))
    before = {n: p.clone() for n, p in host.model.named_parameters()}
    optimizer = torch.optim.AdamW(host.trained().values(), lr=0.1, weight_decay=0.1)
    host.model(**tiny.batch(model)).loss.backward()
    optimizer.step()
    changed = {n for n, p in host.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(host.selected) != set()


def test_nothing_below_the_first_trained_block_keeps_a_graph() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(Partial(n_last=2))
    inputs: list[Tensor] = []
    for path in host.layout.blocks:
        layer = host.model.get_submodule(path)
        layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    host.model(**tiny.batch("llama"))
    assert [x.requires_grad for x in inputs] == [False, False, True]


def test_biases_can_stay() -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(Partial(train_biases=False))
    assert host.selected
    assert not any(n.endswith(".bias") for n in host.selected)


def test_a_tied_head_is_reported_and_can_be_untied() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(Partial(preset="head"))
    assert "lm_head.weight (tied to model.embed_tokens.weight)" in host.matched["default"]
    assert host.selected == ("model.embed_tokens.weight",)
    host = Host(tiny.models()["llama"]())
    host.add(Partial(preset="head", untie=True))
    assert host.selected == ("lm_head.weight",)
    base = tiny.models()["llama"]()(**tiny.batch("llama")).logits
    assert torch.equal(host.model(**tiny.batch("llama")).logits, base)


def test_an_untied_head_is_published_and_read_back(tmp_path: Path) -> None:
    host = Host(tiny.models()["llama"]())
    host.add(Partial(preset="head", untie=True))
    with torch.no_grad():
        host.model.lm_head.weight.add_(0.1)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()["llama"]())
    adapter.load(again, tmp_path)
    batch = tiny.batch("llama")
    assert torch.equal(again.model(**batch).logits, host.model(**batch).logits)


# -- rows of the token table -----------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
def test_chosen_rows_train_as_they_do_with_the_whole_table(model: str, tmp_path: Path) -> None:
    ids = tuple(tiny.batch(model)["input_ids"][0, :3].tolist())
    host, whole = Host(tiny.models()[model]()), Host(tiny.models()[model]())
    host.add(Partial(preset="embed_head", token_ids=ids))
    whole.add(Partial(preset="embed_head"))
    (rows,) = host.trained().values()
    assert rows.shape == (3, 32)
    batch = tiny.batch(model)
    out = host.model(**batch)
    wanted = whole.model(**batch)
    torch.testing.assert_close(out.logits, wanted.logits)
    out.loss.backward()
    wanted.loss.backward()
    table = whole.model.get_input_embeddings().weight
    torch.testing.assert_close(rows.grad, table.grad[list(ids)], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        rows.add_(0.5)
        table[list(ids)] += 0.5
    torch.testing.assert_close(
        host.model(**batch).logits, whole.model(**batch).logits, atol=1e-5, rtol=1e-5
    )
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    assert torch.equal(again.model(**batch).logits, host.model(**batch).logits)


def test_rows_merge_into_a_table_of_their_own() -> None:
    host = Host(tiny.models()["bert"]())
    host.add(Partial(preset="embed_head", token_ids=(4, 40, 11)))
    with torch.no_grad():
        next(iter(host.trained().values())).add_(0.5)
    apart = host.model(**tiny.batch("bert")).logits
    host.merge()
    torch.testing.assert_close(host.model(**tiny.batch("bert")).logits, apart)


@pytest.mark.parametrize("ids", [(64,), (3, 3)])
def test_rows_must_be_different_rows_of_the_table(ids: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="different numbers below 64"):
        Host(tiny.models()["llama"]()).add(Partial(preset="embed_head", token_ids=ids))


def test_rows_are_told_before_they_train(cli: Cli, tiny_run: list[str]) -> None:
    words = [word for word in tiny_run if not word.startswith("method.")]
    words += ["method=partial", "method.preset=embed_head", "method.token_ids=[5,6]"]
    assert "preset=embed_head token_ids=5,6" in cli("check", *words).stderr


def test_rows_need_the_preset_of_the_embeddings_and_tokens() -> None:
    with pytest.raises(ConfigError, match="preset=embed_head"):
        Host(tiny.models()["llama"]()).add(Partial(token_ids=(3,)))
    with pytest.raises(NotApplicable, match="no token embeddings"):
        Host(tiny.models()["vit"]()).add(Partial(preset="embed_head", token_ids=(3,)))


# -- Hugging Face peft's LN tuning -----------------------------------------------------------------
TASKS = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "classification", "t5": "seq2seq"}
TASKS |= {"vit": "image_classification"}
NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "bert": ["LayerNorm"],
    "t5": ["layer_norm", "final_layer_norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
}


def test_a_tiny_llama_has_seven_norms_here_and_in_peft() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(Partial(preset="layernorm"))
    config = peft.LNTuningConfig(target_modules=NORMS["llama"])
    with pytest.warns(UserWarning, match="proceed at your own risk"):
        theirs = peft.get_peft_model(tiny.models()["llama"](), config)
    assert host.num_parameters()[0] == 7 * 32 == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", sorted(NORMS))
def test_norms_travel_to_peft_and_back(model: str, tmp_path: Path) -> None:
    head = ["classifier"] if model == "bert" else []
    host = Host(tiny.models()[model](), head)
    host.add(Partial(preset="layernorm"))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.1 * torch.randn_like(p))
    adapter.save(host, "default", tmp_path / "ours", TASKS[model], "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = Host(tiny.models()[model]())
    adapter.load(back, tmp_path / "theirs")
    batch = tiny.batch(model)
    with torch.no_grad():
        ours, stock, again = (m(**batch).logits for m in (host.model, theirs, back.model))
    torch.testing.assert_close(stock, ours)
    torch.testing.assert_close(again, ours)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_rows_of_the_token_table_travel_to_peft_and_back(model: str, tmp_path: Path) -> None:
    ids, batch = tuple(tiny.batch(model)["input_ids"][0, :3].tolist()), tiny.batch(model)
    host = Host(tiny.models()[model]())
    host.add(Partial(preset="embed_head", token_ids=ids))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.3 * torch.randn_like(p))
    adapter.save(host, "default", tmp_path / "ours", TASKS[model], "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = Host(tiny.models()[model]())
    adapter.load(back, tmp_path / "theirs")
    assert isinstance(back.adapters["default"], Partial)
    with torch.no_grad():
        ours, stock, again = (m(**batch).logits for m in (host.model, theirs, back.model))
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-4)


def test_rows_that_peft_computes_otherwise_are_told() -> None:
    for host, why in (
        (Host(tiny.t5()), "both stacks"),
        (Host(tiny.bert(), ["classifier"]), "save no head"),
    ):
        host.add(Partial(preset="embed_head", token_ids=(3, 4)))
        assert why in (host.adapters["default"].hf_refuses(host, "default") or "")
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["lm_head"], "token_indices": [3]}
    with pytest.raises(ValueError, match="no token table"):
        Partial.from_hf(config)


# -- features of the frozen prefix -----------------------------------------------------------------
def test_a_frozen_prefix_runs_once_an_example_and_trains_the_same(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"packing": False, "max_steps": 14, "lr": 1e-3}
    plain = make_loop(folder=tmp_path / "plain", method=Partial(), **options)
    cached = make_loop(method=Partial(cache_frozen_prefix=True), **options)
    frozen = [cached.host.model.get_submodule(f"model.layers.{i}.mlp") for i in (0, 1)]
    calls = []
    for mlp in frozen:
        mlp.register_forward_hook(lambda *_: calls.append(1))
    plain.fit()
    cached.fit()
    assert len(calls) == 2 * 22  # examples, of which 14 steps see each two or three times
    mine, wanted = cached.host.state(), plain.host.state()
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=1e-4)
    evaluated = [loop.host.model.eval()(**tiny.batch("llama")).logits for loop in (plain, cached)]
    torch.testing.assert_close(*evaluated, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2 * 22 + 2


def test_a_run_with_kept_features_that_was_stopped_ends_bit_for_bit_the_same(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"max_steps": 9, "method": Partial(cache_frozen_prefix=True)}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    paused = interrupted(make_loop, tmp_path / "paused", [4], **options)
    wanted = straight.host.state()
    assert all(torch.equal(t, wanted[n]) for n, t in paused.host.state().items())


def test_a_head_alone_keeps_the_features_of_every_block(tmp_path: Path) -> None:
    host = Host(tiny.bert(), ["classifier"])
    host.add(Partial(preset="head", cache_frozen_prefix=True), data=tiny.Look(host.model, "bert"))
    batch = tiny.batch("bert")
    wanted = host.model.eval()(**batch).logits
    torch.testing.assert_close(host.model.train()(**batch).logits, wanted, atol=1e-6, rtol=1e-5)
    adapter.save(host, "default", tmp_path, "classification", "base")
    again = Host(tiny.bert())
    adapter.load(again, tmp_path)
    assert torch.equal(again.model(**batch).logits, host.model.eval()(**batch).logits)
    assert not again.sites["default"]


def test_features_that_differ_or_are_not_there_are_not_kept() -> None:
    def refused(error: type[ConfigError], match: str, host: Host, **fields: object) -> None:
        data = tiny.Look(host.model, "bert")
        with pytest.raises(error, match=match):
            host.add(Partial(cache_frozen_prefix=True, **fields), data=data)
        assert not host.trained()

    refused(NotApplicable, "no block lies below", Host(tiny.bert()), preset="embed_head")
    refused(NotApplicable, "no block lies below", Host(tiny.llama()), n_last=3)
    refused(NotApplicable, "ViTForImageClassification is none", Host(tiny.vit()))
    refused(NotApplicable, "T5ForConditionalGeneration is none", Host(tiny.t5()))
    refused(ConfigError, "token_ids", Host(tiny.llama()), preset="embed_head", token_ids=(3,))
    config = BertConfig(**{**tiny.bert().config.to_dict(), "hidden_dropout_prob": 0.1})
    refused(ConfigError, "drop out at random", Host(BertForSequenceClassification(config)))


# -- mistakes --------------------------------------------------------------------------------------
def test_an_expression_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Nearest: .*model\.norm\.weight"):
        Host(tiny.models()["llama"]()).add(Partial(modules=("model.nrm.weight",)))


def test_custom_needs_modules() -> None:
    with pytest.raises(ConfigError, match=r"name the parameters in method\.modules"):
        Host(tiny.models()["llama"]()).add(Partial(preset="custom"))


def test_more_last_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 3 blocks"):
        Host(tiny.models()["llama"]()).add(Partial(n_last=4))


def test_quantised_weights_are_refused_and_their_norms_train() -> None:
    host = Host(tiny.quantised(tiny.models()["llama"](), "nf4"))
    with pytest.raises(ConfigError, match="quantised weights cannot"):
        host.add(Partial())
    assert not host.trained()
    host.add(Partial(preset="layernorm"))
    assert host.num_parameters()[0] == 7 * 32
