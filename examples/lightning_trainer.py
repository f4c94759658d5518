"""A Lightning Trainer over DDP, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/lightning_trainer.py

A checkpoint needs the exchange's state too: return `exchange.gathered_state_dict()` from the callback's `state_dict`,
and load it in `on_fit_start`, since the callback's `load_state_dict` comes before.
"""

import json

import gradwire
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class CompressedGradients(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.exchange = gradwire.attach(trainer.strategy.model, "maxmin", bits=4, error_feedback=True)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


seed_everything(0)
inputs = torch.randn(8192, 64)
data = TensorDataset(inputs, nn.Linear(64, 10)(inputs).argmax(1))
model, compressed = Classifier(), CompressedGradients()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(accelerator="cpu", strategy="ddp", devices=2, max_epochs=2, callbacks=[compressed], **quiet)
trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))

report, weights = compressed.exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": model.losses[0], "loss": model.losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
compressed.exchange.close()
