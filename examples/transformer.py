"""A small language model: a transformer that reads characters, its gradients in 4 bits a value.

    torchrun --standalone --nproc_per_node 2 examples/transformer.py
"""

import json
import sysconfig
from pathlib import Path

import gradwire
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CONTEXT, WIDTH = 64, 128


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.characters(text) + self.places.weight
        return torch.as_tensor(self.head(self.blocks(hidden, mask=self.mask, is_causal=True)))


dist.init_process_group("gloo")
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # a text that every Python has
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:1_000_000]))
torch.manual_seed(0)
model = DistributedDataParallel(LanguageModel())
exchange = gradwire.attach(model, "maxmin", bits=4, error_feedback=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

torch.manual_seed(1 + dist.get_rank())  # each rank reads other pages
losses = []
for _ in range(60):
    rows = torch.stack([text[at : at + CONTEXT + 1] for at in torch.randint(len(text) - CONTEXT, (16,)).tolist()])
    loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

report, weights = exchange.report(), nn.utils.parameters_to_vector(model.parameters())
result = {"first_loss": losses[0], "loss": losses[-1], "bytes_sent": report.bytes_sent}
print(json.dumps({**result, "bytes_float32": report.bytes_dense, "weights": torch.hash_tensor(weights).item()}))
exchange.close()
dist.destroy_process_group()
