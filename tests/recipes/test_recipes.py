"""Every recipe is executed on a tiny model of its architecture: trained, published, reloaded,
evaluated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Cli

RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MODEL = {
    "lora_llama": "llama",
    "lora_llama_chat": "llama",
    "autopeft_minilm": "bert",
    "lora_minilm": "bert",
    "methods_minilm": "bert",
    "full_minilm": "bert",
    "lora_t5": "t5",
    "qlora_llama": "llama",
    "tfew_t5": "t5",
    "lora_gpt2": "gpt2",
    "lora_vit": "vit",
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten red and ten blue pictures, one folder a class."""
    for label, colour in (("blue", (20, 30, 200)), ("red", (200, 30, 20))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            shade = tuple(c + 3 * i for c in colour)
            Image.new("RGB", (20 + i, 24), shade).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def own_data(recipe: str, chats: Path, images: Path) -> list[str]:
    if recipe == "lora_llama_chat":
        return [f"dataset.path={chats}", "dataset.eval_samples=6"]
    if recipe == "lora_vit":
        return [f"dataset.path={images}", "dataset.eval_samples=6"]
    return ["dataset.train_samples=24", "dataset.eval_samples=8", "dataset.max_length=512"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_trains_publishes_and_reloads(
    recipe: str, cli: Cli, models: Path, chats: Path, images: Path, tmp_path: Path
) -> None:
    words = [
        f"+recipe={recipe}",
        f"model.name_or_path={models / MODEL[recipe]}",
        "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=4",
        "trainer.bf16=false",  # roles of one fused linear are saved as one, which rounds otherwise
        *own_data(recipe, chats, images),
    ]
    cli(*words, "run_dir=run")
    after = json.loads((tmp_path / "run" / "result.json").read_text())["train_info"]["metrics"][
        "after"
    ]
    again = json.loads(cli("eval", "run", "--json").stdout)["metrics"]
    assert again == pytest.approx(after, abs=1e-5)
