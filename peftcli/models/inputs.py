"""What turns text and images into a model's inputs: its tokenizer and its image processor."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from peftcli.errors import DataError, first_sentence
from peftcli.models.convert import folder_of
from peftcli.models.quiet import quiet
from peftcli.models.source import Source, tokenizer_folder
from peftcli.settings import Model


def load_tokenizer(source: Source, cfg: Model) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template of `cfg.chat_template` and with a padding token."""
    folder = tokenizer_folder(cfg.tokenizer) if cfg.tokenizer else folder_of(source)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=cfg.trust_remote_code
            )
    except (ValueError, OSError, TypeError) as error:
        raise DataError(
            f"{folder} has no tokenizer that can be read ({first_sentence(error)}). "
            "Name the folder or hub id of one: model.tokenizer."
        ) from None
    if cfg.chat_template:
        tokenizer.chat_template = _read_template(Path(cfg.chat_template).expanduser())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_image_processor(source: Source, cfg: Model) -> Any:
    """What turns images into `pixel_values`, on PIL and numpy: torchvision is not needed."""
    folder = folder_of(source)
    try:
        with quiet():
            if ours := _pil_processor(folder):
                return ours.from_pretrained(folder)
            return AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=cfg.trust_remote_code
            )
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"{folder} has no image processor: {first_sentence(error)}") from None


def pixels(processor: Any, images: Sequence[str | Path | bytes | Image.Image]) -> Tensor:
    """Images by path, content or object as `pixel_values` (B, 3, H, W)."""
    opened = [_open(image) for image in images]
    return processor(opened, return_tensors="pt")["pixel_values"]


def _pil_processor(folder: Path) -> Any:
    """The PIL class of the folder's processor; before 5.23 AutoImageProcessor wants torchvision."""
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    return getattr(transformers, f"{name}Pil", None)


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"model.chat_template={path}: there is no such file.")
    return path.read_text(encoding="utf-8")


def _open(image: str | Path | bytes | Image.Image) -> Image.Image:
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return image.convert("RGB")
