"""Mixed precision: a GradScaler's loss scale and skipped steps, declared to the exchange.

    torchrun --standalone --nproc_per_node 2 examples/grad_scaler.py

What error feedback remembers is then in units of the gradients, and a step that overflowed leaves no trace in it.
"""

import json

import gradwire
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
teacher = nn.Linear(64, 10)  # its classes are what is learned
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10)))
exchange = gradwire.attach(model, "maxmin", bits=4, error_feedback=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large for float16: the first steps overflow

torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
losses, skipped = [], 0
for _ in range(100):
    inputs = torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(inputs), teacher(inputs).argmax(1))
    optimizer.zero_grad()
    exchange.begin_step(scaler.get_scale())
    scaler.scale(loss).backward()
    finite = exchange.finish()
    scaler.step(optimizer)
    scaler.update()
    exchange.settle(finite)
    losses.append(loss.item())
    skipped += not finite

report, weights = exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "skipped": skipped, "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
dist.destroy_process_group()
