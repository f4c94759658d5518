"""Local steps of AdamW, and an outer step of 4-bit pseudo-gradients every H of them (DiLoCo, Douillard et al. 2023,
arXiv:2311.08105), on a character model of a million parameters.

    PYTHONPATH=. torchrun --nproc_per_node 2 examples/diloco.py --every 10

`--every 1` is synchronous training, `--bits 32` is in float32.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import compression

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--every", type=int, default=10, help="H, inner steps to an outer one")
parser.add_argument("--bits", type=int, default=4, help="of the pseudo-gradients; 32 is float32")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
flags = parser.parse_args()

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # a text that every Python has
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:4_000_000]))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(256, 128), nn.GRU(128, 384, batch_first=True)
        self.head = nn.Linear(384, 256)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.hidden(self.embedding(characters))[0]))


def loss_of(generator: torch.Generator, batch: int) -> torch.Tensor:
    starts = torch.randint(len(text) - 65, (batch,), generator=generator)
    rows = torch.stack([text[start : start + 65] for start in starts.tolist()])
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


torch.manual_seed(flags.seed)
model = Model()
anchor = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
delta = {name: torch.zeros_like(values) for name, values in anchor.items()}
how = {"bits": flags.bits, "error_feedback": True} if flags.bits < 32 else {}
averaging = compression.averaging(delta, "maxmin" if how else "none", seed=flags.seed, **how)
inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
outer = torch.optim.SGD(anchor.values(), lr=0.7, momentum=0.9, nesterov=True)
generator = torch.Generator().manual_seed(1000 * flags.seed + rank)
for step in range(1, flags.steps + 1):
    inner.zero_grad()
    loss_of(generator, 16).backward()
    if flags.every == 1:  # synchronous: the gradients themselves
        for name, parameter in model.named_parameters():
            delta[name].copy_(parameter.grad)
        averaging.average_()
        for name, parameter in model.named_parameters():
            parameter.grad.copy_(delta[name])
    inner.step()
    if flags.every > 1 and step % flags.every == 0:
        for name, parameter in model.named_parameters():
            torch.sub(anchor[name], parameter.detach(), out=delta[name])
        averaging.average_()
        for name, values in anchor.items():
            values.grad = delta[name]
        outer.step()
        model.load_state_dict(anchor)
with torch.no_grad():
    loss = sum(loss_of(torch.Generator().manual_seed(batch), 64).item() for batch in range(8)) / 8
if rank == 0:
    sent = averaging.report().bytes_sent
    print(json.dumps({**vars(flags), "ranks": ranks, "loss": round(loss, 4), "megabytes_sent": round(sent / 1e6, 2)}))
averaging.close()
dist.destroy_process_group()
