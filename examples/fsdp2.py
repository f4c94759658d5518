"""FSDP2: a transformer sharded over the ranks of a host, its gradients averaged over hosts in 4 bits a value.

    torchrun --standalone --nproc_per_node 4 examples/fsdp2.py --ranks-per-host 2

Here two ranks are taken as a host. `--no-compression` averages in float32.
"""

import argparse
import json
from pathlib import Path

import gradwire
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

CONTEXT, WIDTH = 64, 128


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden, mask = self.characters(rows[:, :-1]), nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        hidden = self.blocks(hidden + self.places.weight, mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ranks-per-host", type=int, default=2, help="default: 2")
parser.add_argument("--no-compression", action="store_true", help="average in float32")
flags = parser.parse_args()
dist.init_process_group("gloo")
hosts = dist.get_world_size() // flags.ranks_per_host
mesh = dist.init_device_mesh("cpu", (hosts, flags.ranks_per_host), mesh_dim_names=("hosts", "ranks"))
sources = sorted(Path(json.__file__).parents[1].glob("*.py"))  # a text that every Python has
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:1_000_000]))
model = LanguageModel()
for module in (*model.blocks.layers, model):
    fully_shard(module, mesh=mesh["ranks"])  # inside a host, as FSDP does it
compressor = gradwire.build("none") if flags.no_compression else gradwire.build("maxmin", bits=4, error_feedback=True)
exchange = gradwire.attach(model, compressor, mesh=mesh)  # between hosts, which begin with the first one's weights
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(40):
    torch.manual_seed(1000 * step + dist.get_rank())  # each rank reads other pages
    pages = torch.randint(len(text) - CONTEXT, (16,)).tolist()
    loss = model(torch.stack([text[at : at + CONTEXT + 1] for at in pages]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
report, weights = exchange.report(), torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])
result = {"loss": loss.item(), "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
dist.destroy_process_group()
