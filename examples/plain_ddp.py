"""DistributedDataParallel in plain torch, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/plain_ddp.py

A checkpoint needs `exchange.gathered_state_dict()` too, which all ranks call, and `exchange.load_state_dict` of it.
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

torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
losses = []
for _ in range(100):
    inputs = torch.randn(64, 64)
    loss = nn.functional.cross_entropy(model(inputs), teacher(inputs).argmax(1))
    optimizer.zero_grad()
    loss.backward()  # averages the gradients of all ranks
    optimizer.step()
    losses.append(loss.item())

report, weights = exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
dist.destroy_process_group()
