"""A model, optimizer and schedule of timm, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/timm_model.py
"""

import json

import gradwire
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 40

dist.init_process_group("gloo")
torch.manual_seed(0)
patterns = torch.randn(10, 3, 32, 32)  # one a class
small = {"img_size": 32, "patch_size": 8, "depth": 4, "num_classes": 10}
model = DistributedDataParallel(timm.create_model("vit_tiny_patch16_224", **small))
exchange = gradwire.attach(model, "maxmin", bits=4, error_feedback=True)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=STEPS, warmup_epochs=5, step_on_epochs=True)

torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
losses = []
for step in range(STEPS):
    scheduler.step(step)
    labels = torch.randint(10, (32,))
    images = patterns[labels] + 2 * torch.randn(32, 3, 32, 32)
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

report, weights = exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
dist.destroy_process_group()
