"""Models as users hand them over: what wraps them, what DDP reduces of them, and what cannot be averaged."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The DDP module within wrappers such as torch.compile's, to any depth; without one, the model itself.

    Raises ValueError where a model is trained in several DDP modules, or in one and beside it.
    """
    while isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's name for what it wraps
        model = inside
    if isinstance(model, DistributedDataParallel):
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(f"gradients are those of a module, got {type(model).__name__}; attach to the module itself")
    inner = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not inner:
        return model
    held = {id(parameter) for module in inner for parameter in module.parameters()}
    beside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if len(inner) > 1 or beside:
        what = f"{len(inner)} DistributedDataParallel modules" if len(inner) > 1 else f"{beside[0]} outside of its DDP"
        raise ValueError(f"this model trains {what}: attach to each DistributedDataParallel module by itself")
    return inner[0]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are averaged, by name in the model's order: those that DDP reduces, or that are trained.

    DDP settles what it reduces when it is made; later it does not look at `requires_grad`, and it leaves out what it
    was told to ignore.

    Raises ValueError where there are none, and for parameters that no compressor can take.
    """
    if isinstance(model, DistributedDataParallel):
        _refuse_sparse(model.module)
        reduced = {id(p) for bucket in model.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
        parameters = {name: p for name, p in model.module.named_parameters() if id(p) in reduced}
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} was frozen after DistributedDataParallel had been made, which still reduces it; "
                    "freeze parameters before"
                )
    else:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing of this model is trained, no parameter requires grad: there is nothing to average")
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name} is complex, and gradients are averaged as real numbers; keep it as a real one with "
                "a last dimension of 2, and use torch.view_as_complex in forward"
            )
    return parameters


def has_shards(model: nn.Module) -> bool:
    """Whether a rank holds pieces of some parameters. Told without loading what shards them."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def check_ranks(model: nn.Module) -> None:
    """Raise ValueError where torch.distributed has ranks that nothing would average over."""
    if isinstance(model, DistributedDataParallel) or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    raise ValueError(
        f"torch.distributed has {dist.get_world_size()} ranks, and this model is not wrapped in "
        "DistributedDataParallel: its ranks would train apart; wrap it, or give collectives: Solo() for one rank "
        "alone, TorchDistributed(group) for the ranks of a group"
    )


def _refuse_sparse(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ValueError(
                f"{name or 'this module'} has sparse gradients, which no compressor takes; make it with sparse=False, "
                "or train without compression"
            )


def finds_unused(model: nn.Module) -> bool:
    """Whether DDP expects steps that do not use all parameters."""
    if not isinstance(model, DistributedDataParallel):
        return False
    return bool(model.find_unused_parameters or model.static_graph)

