"""Parameter groups, and the SGD that steps them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from image_classification.optim import ParameterGroup, parameter_groups, sgd


class Block(nn.Module):
    """A residual block whose batch norms have names that do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.bn_lookalike = nn.Linear(4, 2)


BATCH_NORM_PARAMETERS = {"first.weight", "first.bias", "downsample.1.weight", "downsample.1.bias"}


def settings_of(groups: list[ParameterGroup], key: str) -> dict[str, object]:
    return {name: group.get(key) for group in groups for name, _ in group["params"]}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Block()
    model.conv.weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, without_momentum=["conv.bias"])
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters() if name != "conv.weight")


def test_batch_norms_do_not_decay_wherever_they_are_and_whatever_they_are_called() -> None:
    decay = settings_of(parameter_groups(Block(), weight_decay=0.1), "weight_decay")
    assert {name for name, value in decay.items() if value == 0} == BATCH_NORM_PARAMETERS
    assert set(decay.values()) == {0.0, 0.1}


def test_batch_norms_decay_like_all_else_when_asked_to() -> None:
    decay = settings_of(parameter_groups(Block(), weight_decay=0.1, bn_weight_decay=True), "weight_decay")
    assert set(decay.values()) == {0.1}


def test_momentum_is_off_for_the_named_parameters_only() -> None:
    momentum = settings_of(
        parameter_groups(Block(), weight_decay=0.1, without_momentum=["conv.weight", "first.weight"]), "momentum"
    )
    assert {name for name, value in momentum.items() if value == 0} == {"conv.weight", "first.weight"}


def test_momentum_cannot_be_off_for_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no trainable parameter is called 'fc\.weight'"):
        parameter_groups(Block(), weight_decay=0.1, without_momentum=["fc.weight"])


def one_group(parameter: nn.Parameter, **options: float) -> list[ParameterGroup]:
    return [{"params": [("p", parameter)], "weight_decay": 0.0, **options}]


def sgd_by_hand(
    start: Tensor, gradients: list[Tensor], lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> Tensor:
    """Sutskever et al. 2013, with the learning rate outside of the momentum, as in torch."""
    weight, velocity = start.double(), torch.zeros_like(start.double())
    for gradient in gradients:
        decayed = gradient.double() + weight_decay * weight
        velocity = momentum * velocity + decayed
        weight = weight - lr * (decayed + momentum * velocity if nesterov else velocity)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_steps_are_those_of_the_formula_in_every_precision(dtype: torch.dtype, momentum: float, nesterov: bool) -> None:
    start = torch.linspace(-1, 1, 70).to(dtype)
    gradients = [torch.linspace(-1, 2, 70).mul(k).to(dtype) for k in (1, -2, 3)]
    parameter = nn.Parameter(start.clone())
    optimizer = sgd(one_group(parameter, weight_decay=0.1), lr=0.1, momentum=momentum, nesterov=nesterov)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = sgd_by_hand(start, gradients, 0.1, momentum, 0.1, nesterov)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(parameter.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_flag_on_the_device_skips_a_step_entirely_even_the_first_one() -> None:
    skipping, never_asked = (nn.Parameter(torch.ones(40)) for _ in range(2))
    optimizers = [sgd(one_group(p, weight_decay=0.1), lr=0.1, momentum=0.9) for p in (skipping, never_asked)]
    for found_inf in (1.0, 0.0, 1.0, 0.0):
        skipping.grad = torch.full((40,), torch.nan if found_inf else 2.0)
        optimizers[0].found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizers[0].step()
        if not found_inf:
            never_asked.grad = torch.full((40,), 2.0)
            optimizers[1].step()
    assert torch.equal(skipping, never_asked)


def test_a_parameter_without_gradient_keeps_its_value_and_its_momentum() -> None:
    waiting, stepping = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups: list[ParameterGroup] = [{"params": [("w", waiting), ("s", stepping)], "weight_decay": 0.1}]
    optimizer = sgd(groups, lr=0.1, momentum=0.9)
    stepping.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(waiting, torch.ones(3))
    assert torch.equal(optimizer.state[waiting]["momentum_buffer"], torch.zeros(3))
    assert not torch.equal(stepping, torch.ones(3))


class OnGpu(nn.Parameter):
    """A parameter that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


class FusedSGD(torch.optim.SGD):
    """Stands in for apex's."""


def test_apex_steps_parameters_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedSGD=FusedSGD))
    assert type(sgd(one_group(OnGpu(torch.ones(3))), lr=0.1)) is FusedSGD
    assert type(sgd(one_group(nn.Parameter(torch.ones(3))), lr=0.1)) is torch.optim.SGD
    assert type(sgd(one_group(OnGpu(torch.ones(3, dtype=torch.bfloat16))), lr=0.1)) is torch.optim.SGD


def test_torch_steps_them_where_apex_lacks_its_cuda_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_extensions(*args: object, **options: object) -> None:
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedSGD=without_extensions))
    assert type(sgd(one_group(OnGpu(torch.ones(3))), lr=0.1)) is torch.optim.SGD
