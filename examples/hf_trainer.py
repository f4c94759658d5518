"""A Hugging Face Trainer that trains a small GPT-2 from its configuration, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/hf_trainer.py

A checkpoint needs `exchange.gathered_state_dict()` too: all ranks call it in `on_save`, and one saves it.
"""

import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import gradwire
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed


class CompressedGradients(TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.exchange = gradwire.attach(trainer.model_wrapped, "maxmin", bits=4, error_feedback=True)


set_seed(0)
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # a text that every Python has
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:200_000]))
rows = [{"input_ids": row, "labels": row} for row in text.split(64)[:-1]]
small = {"vocab_size": 256, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
compressed = CompressedGradients()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=16, max_steps=60, learning_rate=2e-3, logging_steps=5,
        save_strategy="no", report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[compressed])
    trainer.train()

losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
report, weights = compressed.exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
compressed.exchange.close()
