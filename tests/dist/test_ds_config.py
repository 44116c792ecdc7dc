"""DeepSpeed's JSON file beside the run's own keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli import config
from peftcli.dist import ds_config
from peftcli.errors import ConfigError
from peftcli.settings import DeepSpeed

FILE = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.0}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
}
WORDS = [
    "strategy=deepspeed",
    "strategy.offload=parameters",
    "launch.num_processes=2",
    "trainer.per_device_train_batch_size=4",
]


def check(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "ds.json").write_text(json.dumps({**FILE, **changes}))
    cfg = config.compose([*WORDS, f"strategy.config={folder / 'ds.json'}"])
    ds_config.check(config.typed(cfg))


def test_a_file_that_says_what_the_keys_say_is_taken(tmp_path: Path) -> None:
    check(tmp_path, {})
    told = ds_config.of_partitions(
        DeepSpeed(offload="parameters", config=str(tmp_path / "ds.json"))
    )
    assert ds_config.unused(DeepSpeed(config=str(tmp_path / "ds.json")))[0].endswith("_gradients")
    assert told["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 1000,
        "offload_param": {"device": "cpu", "pin_memory": True},
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size=16, but trainer.per_device_train_batch_size"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, but trainer.max_grad_norm=1.0"),
        ({"zero_optimization": {"stage": 2}}, "stage=2, but strategy.zero_stage=3"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            'offload_param.device="nvme", but strategy.offload="parameters"',
        ),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type="Lion", but optimizer="AdamW"'),
        ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr=0.0003, but optimizer.lr="),
        ({"scheduler": {"type": "WarmupLR"}}, "is the group scheduler here"),
        ({"fp16": {"enabled": True}}, "use trainer.bf16"),
        ({"gradient_cliping": 1}, "no key 'gradient_cliping' is understood here. Did"),
        ({"zero_optimization": []}, "zero_optimization=[]: takes a mapping"),
    ],
    ids=str,
)
def test_a_file_that_says_something_else_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(tmp_path, changes)
    assert said in str(refused.value)
    assert "ds.json" in str(refused.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        ds_config.read(DeepSpeed(config=str(tmp_path / "ds.json")))
