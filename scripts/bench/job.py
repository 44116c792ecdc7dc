"""A whole job, from the command to its result: `+recipe=lora_llama` here, and by Trainer.

    python scripts/bench/job.py [--steps 100] [--rounds 1] [--json]

Both start a process, load SmolLM2, put LoRA on all linears, evaluate on 500 held-out reviews, train
on the same examples (16 a step), evaluate again and save the adapter. The peer is what one writes
with Hugging Face peft and transformers' Trainer in the same precision; it is handed the token ids
of chats and need not tokenise, and its accuracy is that of the most likely token of each target.
They take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_step import base_dtype, where
from startup import PROGRAM, prepared, seconds

JOB = ["+recipe=lora_llama", "trainer.save_steps=null"]


def write_examples(folder: Path, steps: int) -> Path:
    """Token ids and labels of the recipe's examples, beside the folder of the model."""
    run, model, _, data = prepared(JOB, folder)
    taken = range(steps * run.trainer.per_device_train_batch_size)
    plain = {
        "train": [_row(data.train[i]) for i in taken],
        "eval": [_row(row) for row in data.eval],
    }
    path = folder / "examples.json"
    path.write_text(json.dumps({"model": model, **plain}))
    return path


def _row(row: dict[str, Any]) -> dict[str, list[int]]:
    ids = row["input_ids"].tolist()
    return {
        "input_ids": ids,
        "labels": [
            token if of_loss else -100
            for token, of_loss in zip(ids, row["supervised"], strict=True)
        ],
    }


def by_trainer(path: Path) -> None:
    """The job with Trainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    given = json.loads(path.read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(given["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(given["model"], dtype=base_dtype())
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=str(path.parent / "trainer"),
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            num_train_epochs=1,
            learning_rate=5e-4,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            eval_on_start=True,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=base_dtype() == torch.bfloat16,
            seed=0,
        ),
        train_dataset=Dataset.from_list(given["train"]),
        eval_dataset=Dataset.from_list(given["eval"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda got: {"accuracy": _accuracy(got)},
    )

    trainer.train()
    trainer.save_model()
    print(trainer.state.log_history[-2:], flush=True)


def _accuracy(got: Any) -> float:
    told, asked = got.predictions[:, :-1], got.label_ids[:, 1:]
    return float(((told == asked) | (asked == -100)).all(1).mean())


def main() -> None:
    """Race, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        return by_trainer(args.trainer)
    with tempfile.TemporaryDirectory() as name:
        examples = write_examples(Path(name), args.steps)
        times: dict[str, list[float]] = {"ours": [], "HF peft and Trainer": []}
        for i in range(args.rounds):
            words = [*JOB, f"trainer.max_steps={args.steps}", f"run_dir={name}/{i}"]
            times["ours"].append(seconds([PROGRAM, *words]))
            peer = [sys.executable, __file__, "--trainer", str(examples)]
            times["HF peft and Trainer"].append(seconds(peer))
    rows = {what: statistics.median(took) for what, took in times.items()}
    ratio = statistics.median(
        p / o for o, p in zip(times["ours"], times["HF peft and Trainer"], strict=True)
    )
    if args.json:
        print(json.dumps({"where": where(), "rows": rows, "ratio": ratio}, indent=2))
        return None
    print(f"{where()}\n{args.steps} steps, {args.rounds} rounds, ours {ratio:.2f} times as fast\n")
    print("\n".join(["| | s |", "|---|---|", *(f"| {w} | {s:.0f} |" for w, s in rows.items())]))
    return None


if __name__ == "__main__":
    main()
