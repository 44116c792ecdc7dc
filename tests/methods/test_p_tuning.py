"""What P-tuning promises: counts, the template, folding, and that v2 is prefix tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    RobertaConfig,
)

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.cloze import ClozeTokens, Words
from peftcli.methods.p_tuning import PTuning
from peftcli.methods.prefix import prefixes_of
from peftcli.methods.prefix_tuning import PrefixTuning
from peftcli.methods.prompt import LaidTokens, prompt_of
from peftcli.models.load import empty_model
from tests import tiny
from tests.conftest import Cli

CLS, SEP, FIRST = 2, 3, 100  # [CLS], [SEP], the first laid id


def adapted(model: str | torch.nn.Module, *new: str, **fields: Any) -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]() if isinstance(model, str) else model, new)
    host.add(PTuning(**fields))
    return host


@pytest.mark.parametrize(
    ("config", "length", "count"),
    [
        (RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16), 8, 393_216),
        (
            RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
            128,
            6291456,
        ),
        (BertConfig(), 20, 368_640),
    ],
)
def test_v2_trains_keys_and_values(config: PreTrainedConfig, length: int, count: int) -> None:
    host = Host(empty_model(config, "classification"))
    host.add(PTuning(pre_seq_len=length))
    assert host.num_parameters()[0] == count


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 8_278_272),
        ({"template": (20, 0, 0), "encoder": "mlp"}, 1_787_136),
        # BiLSTM of 2 layers with h = 768 each way, then 4hh + 2h and 2hd + d
        (
            {"template": (20, 0, 0), "encoder_hidden_size": 768},
            15_360 + 2 * 4 * 768 * (768 + 768 + 2) + 2 * 4 * 768 * (1536 + 768 + 2)
            + (4 * 768**2 + 2 * 768) + (2 * 768**2 + 768),
        ),
    ],
)  # fmt: skip
def test_v1_trains_its_encoder(fields: dict[str, Any], count: int) -> None:
    host = Host(empty_model(BertConfig(num_hidden_layers=1), "classification"))
    host.add(PTuning(variant="v1", **fields))
    assert host.num_parameters()[0] == count


# -- the template ----------------------------------------------------------------------------------
def laid(front: int, behind: int, inside: bool, rows: list[list[int]]) -> list[list[int]]:
    """Rows, padded with 0 on the right, with their trained tokens; p is the first id onwards."""
    ids = torch.tensor(rows)
    tokens = LaidTokens(FIRST, front, behind, inside)
    return tokens.lay(ids, tokens.columns(ids, (ids > 0).long())).tolist()


def test_the_template_of_an_encoder_stands_between_cls_and_sep() -> None:
    p = [FIRST + i for i in range(9)]
    assert laid(6, 3, True, [[CLS, 11, 12, SEP]]) == [[CLS, *p[:6], 11, 12, *p[6:], SEP]]
    assert laid(2, 0, True, [[CLS, 11, SEP]]) == [[CLS, *p[:2], 11, SEP]]
    assert laid(1, 2, True, [[CLS, 11, SEP, 0], [CLS, 11, 12, SEP]]) == [
        [CLS, p[0], 11, *p[1:3], SEP, 0],
        [CLS, p[0], 11, 12, *p[1:3], SEP],
    ]


def test_the_template_of_a_decoder_stands_around_the_subject() -> None:
    p = [FIRST + i for i in range(3)]
    assert laid(1, 2, False, [[11, 12]]) == [[p[0], 11, 12, *p[1:]]]
    assert laid(1, 2, False, [[11, 0], [11, 12]]) == [[p[0], 11, *p[1:], 0], [p[0], 11, 12, *p[1:]]]


MASK, STOP = 4, 9


def test_a_cloze_template_has_a_mask_and_ends_in_tokens_or_a_stop() -> None:
    p = [FIRST + i for i in range(9)]

    def cloze(template: tuple[int, int, int], *row: int) -> list[int]:
        ids = torch.tensor([row])
        tokens = ClozeTokens(FIRST, template, Words(MASK, STOP, [0]))
        return tokens.lay(ids, tokens.columns(ids, None))[0].tolist()

    wanted = [CLS, *p[:3], MASK, *p[3:6], 11, 12, *p[6:], SEP]
    assert cloze((3, 3, 3), CLS, 11, 12, SEP) == wanted
    assert cloze((1, 1, 0), CLS, 11, SEP) == [CLS, p[0], MASK, p[1], 11, STOP, SEP]


def test_laid_ids_find_their_rows_in_order_and_leave_the_others() -> None:
    host = adapted("bert", variant="v1")
    module, delta = host.model.get_input_embeddings(), prompt_of(host, "default").eval()
    ids = torch.tensor([[CLS, delta.first + 1, 9, delta.first]])
    E, W = delta.rows(), module.weight
    torch.testing.assert_close(module(ids)[0], torch.stack([W[CLS], E[1], W[9], E[0]]))


def test_a_classifying_decoder_reads_the_last_token_of_the_template() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    host = adapted(LlamaForSequenceClassification(config).eval(), variant="v1", template=(1, 2, 0))
    ids, mask = torch.tensor([[9, 8, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    padded = host.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded, host.model(input_ids=ids[:, :3]).logits)


@pytest.mark.parametrize("template", [(3, 3, 3), (3, 3, 0), (0, 0, 0)])
def test_a_language_model_has_all_tokens_in_front(template: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"template=\[9, 0, 0\]|template=\[6, 0, 0\]"):
        adapted("llama", variant="v1", template=template)


# -- v1 --------------------------------------------------------------------------------------------
FRONT = {"variant": "v1", "template": (5, 0, 0)}


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("model", ["llama", "t5", "bert"])
def test_the_folded_encoder_gives_the_same_logits(model: str, encoder: str) -> None:
    host, batch = adapted(model, **FRONT, encoder=encoder), tiny.batch(model)
    before = host.model(**batch).logits
    host.adapters["default"].finish(host)
    torch.testing.assert_close(host.model(**batch).logits, before, atol=1e-6, rtol=1e-5)
    assert [tuple(p.shape) for p in host.trained().values()] == [(5, 32)]


@pytest.mark.parametrize("finished", [True, False])
def test_a_template_is_published_and_read_back(finished: bool, tmp_path: Path) -> None:
    host = adapted("bert", variant="v1")
    if finished:
        host.adapters["default"].finish(host)
    adapter.save(host, "default", tmp_path, "classification", "base")
    again = Host(tiny.models()["bert"]())
    adapter.load(again, tmp_path)
    batch = tiny.batch("bert")
    torch.testing.assert_close(again.model(**batch).logits, host.model(**batch).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_prompts_of_peft_are_read_and_written(model: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = "SEQ_2_SEQ_LM" if model == "t5" else "CAUSAL_LM"
    config = peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=5, encoder_reparameterization_type=kind
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path / "theirs")
    batch = tiny.batch(model)
    ours = host.model(**batch).logits
    torch.testing.assert_close(ours, theirs(**batch).logits[:, -9:], atol=1e-5, rtol=1e-4)
    kinds: Any = {"t5": "seq2seq", "llama": "causal_lm"}
    host = adapted(model, **FRONT)
    host.adapters["default"].finish(host)
    adapter.save(host, "default", tmp_path / "ours", kinds[model], "base")
    stock = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path / "ours").eval()
    ours = host.model(**batch).logits
    torch.testing.assert_close(stock(**batch).logits[:, -9:], ours, atol=1e-5, rtol=1e-4)


# -- words for classes -----------------------------------------------------------------------------
GOOD = {"no": "bad", "yes": "good"}


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT that fills masks."""
    folder = tiny.tiny_bert(tmp_path_factory.mktemp("filler"))
    config = BertConfig.from_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


class Classes(tiny.Look):
    """A task with two classes."""

    labels = ("no", "yes")

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)


def test_a_class_is_what_the_masked_head_says_of_its_word(filler: Path) -> None:
    host = Host(BertForMaskedLM.from_pretrained(filler).eval())
    data = Classes(filler)
    method = PTuning(variant="v1", template=(2, 1, 0), encoder="none", label_words=GOOD)
    host.add(method, data=data)
    prompt, table = prompt_of(host, "default"), host.model.get_input_embeddings().weight
    with torch.no_grad():
        prompt.E.copy_(table[[20, 21, 22]])
    text = data.tokenizer(["the dog is lazy", "a film"], return_tensors="pt", padding=True)
    read, mask, stop = data.tokenizer.convert_tokens_to_ids, data.tokenizer.mask_token_id, "."
    words = [read("bad"), read("good")]
    plain = BertForMaskedLM.from_pretrained(filler).eval()
    for row, wanted in zip(text["input_ids"], host.model(**text).logits, strict=True):
        ids = row[row != 0].tolist()
        laid = [ids[0], 20, 21, mask, 22, *ids[1:-1], read(stop), ids[-1]]
        logits = plain(input_ids=torch.tensor([laid])).logits[0, 3, words]
        torch.testing.assert_close(wanted, logits, atol=1e-6, rtol=1e-5)


def test_a_run_with_words_for_classes_trains_the_prompt_alone(
    filler: Path, cli: Cli, tmp_path: Path
) -> None:
    rows = [{"text": f"film {w} {i}", "label": c} for i in range(12) for c, w in GOOD.items()]
    file = tmp_path / "films.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["method=p_tuning", "method.variant=v1", "method.label_words={no: bad, yes: good}"]
    words += [f"model.name_or_path={filler}", "dataset=file", f"dataset.path={file}"]
    words += ["dataset.format=classification", "dataset.eval_samples=6", "trainer.max_steps=6"]
    words += ["optimizer.lr=1e-2"]
    cli(*words, f"run_dir={tmp_path / 'run'}")
    result = json.loads((tmp_path / "run/result.json").read_text())
    after = result["train_info"]["metrics"]["after"]
    assert after["loss"] != result["train_info"]["metrics"]["before"]["loss"]
    assert result["train_info"]["num_trainable_params"] == 9 * 32  # folded, and no classifier
    again = json.loads(cli("eval", "run", "--json").stdout)["metrics"]
    assert again["loss"] == pytest.approx(after["loss"], abs=1e-5)
    bare = [word for word in words if "label_words" not in word]
    for given, why in {
        "{no: bad, yes: goodness}": "'goodness' is ['good',",
        "{no: bad}": "the classes are no, yes",
        "{no: good, yes: good}": "must give each class a word of its own",
    }.items():
        assert why in cli("check", *bare, f"method.label_words={given}", code=2).stderr


def test_words_need_a_masked_head(cli: Cli, models: Path) -> None:
    with pytest.raises(ConfigError, match="v2 lays no mask"):
        PTuning(label_words=GOOD)
    with pytest.raises(ConfigError, match="LlamaForCausalLM fills no mask"):
        adapted("llama", variant="v1", template=(3, 0, 0), label_words=GOOD)
    words = ["+recipe=lora_minilm", "method=p_tuning", "method.variant=v1"]
    words += ["dataset.on_overlong=drop"]
    words += ["method.label_words={negative: bad, positive: good}"]
    for model, why in {"bert": "has no masked-language head", "llama": "this is llama"}.items():
        assert why in cli("check", *words, f"model.name_or_path={models / model}", code=2).stderr


def test_a_backbone_that_trains_has_a_rate_of_its_own() -> None:
    host = adapted("bert", "classifier", variant="v1", tune_backbone=True)
    groups = host.adapters["default"].param_groups(host, 1e-4, 0.01)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(host.trained())
    for name, parameter in host.trained().items():
        fast = "deltas" in name or name.startswith("classifier")
        assert rates[id(parameter)] == (1e-4 if fast else 1e-5)
    assert "backbone" in (host.adapters["default"].hf_refuses(host, "default") or "")


# -- v2 --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "bert", "t5", "vit"])
def test_v2_is_prefix_tuning_without_the_map_bit_for_bit(model: str) -> None:
    host = adapted(model, hidden_dropout=0.0)
    torch.manual_seed(3)
    other = Host(tiny.models()[model]())
    other.add(PrefixTuning(prefix_length=4, prefix_projection=False))
    batch = tiny.batch(model)
    assert torch.equal(host.model.train()(**batch).logits, other.model.train()(**batch).logits)


def test_v2_drops_keys_and_values_only_while_training() -> None:
    host, batch = adapted("bert"), tiny.batch("bert")
    still = host.model(**batch).logits
    assert torch.equal(host.model(**batch).logits, still)
    assert not torch.equal(host.model.train()(**batch).logits, still)


def test_v2_trains_and_saves_the_head(tmp_path: Path) -> None:
    host = adapted("bert", "classifier")
    assert "classifier.weight" in host.trained()
    adapter.save(host, "default", tmp_path, "classification", "base")
    assert adapter.read_config(tmp_path)["peft_type"] == "PREFIX_TUNING"
    assert adapter.read_config(tmp_path)["modules_to_save"] == ["classifier"]


def test_v2_positions_of_bert_start_behind_the_prefix() -> None:
    host, ids = adapted("bert"), tiny.batch("bert")["input_ids"]
    seen = []
    positions: Any = host.model.get_submodule("bert.embeddings.position_embeddings")
    positions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    host.model(input_ids=ids)
    assert seen[0][0].tolist() == list(range(4, 13))
    assert all(d.W is not None for d in prefixes_of(host, "default"))
