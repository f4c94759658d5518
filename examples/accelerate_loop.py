"""A training loop of Hugging Face Accelerate, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/accelerate_loop.py

A checkpoint needs the state of all ranks: the accelerator, which saves one rank's alone, is given those two functions.
"""

import json
from types import SimpleNamespace

import gradwire
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
inputs = torch.randn(8192, 64)
labels = nn.Linear(64, 10)(inputs).argmax(1)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
exchange = gradwire.attach(model, "maxmin", bits=4, error_feedback=True)  # after prepare(): it has DDP now
state = {"state_dict": exchange.gathered_state_dict, "load_state_dict": exchange.load_state_dict}
accelerator.register_for_checkpointing(SimpleNamespace(**state))

losses = []
for _ in range(3):
    for batch, wanted in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(batch), wanted)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

report, weights = exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
accelerator.end_training()
