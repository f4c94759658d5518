"""DiLoCo (Douillard et al. 2023, arXiv:2311.08105): every H steps of AdamW, an outer step of 4-bit pseudo-gradients.

    torchrun --standalone --nproc_per_node 2 examples/diloco.py --every 10

`--every 1` is synchronous training, `--bits 32` is float32. A checkpoint needs `averaging.gathered_state_dict()` too.
"""

import argparse
import json
import sysconfig
from pathlib import Path

import gradwire
import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name, default in {"every": 10, "bits": 4, "steps": 200, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
flags = parser.parse_args()
torch.distributed.init_process_group("gloo")
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))  # a text that every Python has
text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)[:4_000_000]))
torch.manual_seed(flags.seed)
embedding, hidden, head = nn.Embedding(256, 128), nn.GRU(128, 384, batch_first=True), nn.Linear(384, 256)
model = nn.ModuleDict({"embedding": embedding, "hidden": hidden, "head": head})  # of characters


def loss_of(draw: torch.Generator, batch: int) -> torch.Tensor:
    rows = torch.stack([text[at : at + 65] for at in torch.randint(len(text) - 65, (batch,), generator=draw).tolist()])
    return nn.functional.cross_entropy(head(hidden(embedding(rows[:, :-1]))[0]).flatten(0, 1), rows[:, 1:].flatten())


parameters, synchronous = dict(model.named_parameters()), flags.every == 1
anchor, delta = ({name: parameter.detach().clone() for name, parameter in parameters.items()} for _ in range(2))
for name, values in (parameters if synchronous else anchor).items():
    values.grad = delta[name]  # what is averaged: the gradient of every step, or that of an outer one
how = {"bits": flags.bits, "error_feedback": True} if flags.bits < 32 else {}
averaging = gradwire.averaging(delta, "maxmin" if how else "none", seed=flags.seed, **how)
inner = torch.optim.AdamW(parameters.values(), lr=2e-3)
outer = torch.optim.SGD(anchor.values(), lr=0.7, momentum=0.9, nesterov=True)
draw = torch.Generator().manual_seed(1000 * flags.seed + torch.distributed.get_rank())
for step in range(1, flags.steps + 1):
    inner.zero_grad(set_to_none=False)
    loss_of(draw, 16).backward()
    if synchronous:
        averaging.average_()
    inner.step()
    if not synchronous and step % flags.every == 0:
        for name, parameter in parameters.items():
            torch.sub(anchor[name], parameter.detach(), out=delta[name])
        averaging.average_()
        outer.step()
        model.load_state_dict(anchor)
loss = sum(loss_of(torch.Generator().manual_seed(batch), 64).item() for batch in range(8)) / 8
report, weights = averaging.report(), nn.utils.parameters_to_vector(parameters.values())
result = {**vars(flags), "loss": loss, "bytes_sent": report.bytes_sent, "weights": torch.hash_tensor(weights).item()}
print(json.dumps({**result, "bytes_float32": report.bytes_dense / report.steps * flags.steps}))  # in every step
averaging.close()
