"""The floor: LoRA by hand with TRL and PEFT, as a careful user would write it. No checks, no records.

python benchmarks/floor_trl.py MODEL DATA STEPS OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

MODEL, DATA, STEPS, OUT = sys.argv[1:5]
records: list[dict[str, float]] = []


class Times(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            records.append({"step": state.global_step, "at": time.monotonic(), "tokens": float(logs["num_tokens"])})
            if state.global_step == 1:
                print("step 1/", flush=True)


def split(row):
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


data = load_dataset("json", data_files=DATA, split="train").map(split, remove_columns=["messages"])
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    train_dataset=data,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=OUT + ".trainer",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_steps=int(STEPS),
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        gradient_checkpointing=False,
        max_length=256,
        seed=0,
        data_seed=0,
        disable_tqdm=True,
    ),
    callbacks=[Times()],
)
trainer.train()
trainer.save_model(OUT + ".adapter")
Path(OUT).write_text(json.dumps(records))
