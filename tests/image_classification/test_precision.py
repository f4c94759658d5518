"""Precision, loss scale and master weights."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from image_classification.optim import ParameterGroup, parameter_groups, sgd
from image_classification.precision import LossScale, MixedPrecisionOptimizer, Precision

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)
LEVELS = ["O0", "O1", "O2", "O3"]
HALF = torch.bfloat16


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)
    )


def optimizer_of(
    model: nn.Module, precision: Precision, *, momentum: float = 0.9, weight_decay: float = 0.01
) -> MixedPrecisionOptimizer:
    groups = parameter_groups(model, weight_decay=weight_decay)
    return MixedPrecisionOptimizer(groups, partial(sgd, lr=0.1, momentum=momentum), precision)


def backward(model: nn.Module, optimizer: MixedPrecisionOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 4, 4, generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    model.zero_grad()
    optimizer.scaled(cross_entropy(optimizer.precision.logits(model, images), labels)).backward()


def snapshot(model: nn.Module, optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """Weights, master weights and momentum."""
    state = optimizer.state_dict()
    tensors = [*model.parameters(), *state["masters"].values(), *state["momentum"].values()]
    return [tensor.detach().clone() for tensor in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_half_precision_is_float16_on_a_gpu_and_bfloat16_on_a_cpu() -> None:
    assert Precision.choose(torch.device("cuda"), amp=True).autocast == torch.float16
    assert Precision.choose(CPU, amp=True).autocast == torch.bfloat16


def test_without_a_flag_all_is_float32_and_unscaled() -> None:
    assert Precision.choose(CPU) == Precision(CPU)


def test_fp16_is_level_o2() -> None:
    assert Precision.choose(CPU, fp16=True) == Precision.choose(CPU, amp=True, opt_level="O2")


def test_a_dynamic_scale_goes_before_a_static_one() -> None:
    both = Precision.choose(CPU, fp16=True, static_loss_scale=128, dynamic_loss_scale=True)
    assert both.dynamic_loss_scale
    assert both.loss_scale == 2**16


def test_an_unknown_level_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown optimization level 'O4'; choose one of O0, O1, O2, O3"):
        Precision.choose(CPU, amp=True, opt_level="O4")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_scale_is_a_finite_number_above_zero(scale: float) -> None:
    with pytest.raises(ValueError, match=f"the loss scale is a finite number above 0, got {scale}"):
        Precision.choose(CPU, static_loss_scale=scale)


@pytest.mark.parametrize(
    ("level", "weights", "batch_norm"),
    [
        ("O0", torch.float32, torch.float32),
        ("O1", torch.float32, torch.float32),
        ("O2", HALF, torch.float32),
        ("O3", HALF, HALF),
    ],
)
def test_each_level_has_its_types_and_gives_float32_logits(
    level: str, weights: torch.dtype, batch_norm: torch.dtype
) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level)
    model = precision.convert(small_net())
    assert [tensor.dtype for tensor in model[0].parameters()] == [weights]
    assert {tensor.dtype for tensor in model[4].parameters()} == {weights}
    assert {tensor.dtype for tensor in model[1].parameters()} == {batch_norm}
    assert {model[1].running_mean.dtype, model[1].running_var.dtype} == {batch_norm}
    assert model[1].num_batches_tracked.dtype == torch.int64
    for training in (True, False):
        model.train(training)
        logits = precision.logits(model, torch.randn(6, 3, 4, 4))
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


def test_autocast_computes_in_half_precision() -> None:
    seen = []
    model = small_net()
    model[4].register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    Precision.choose(CPU, amp=True, opt_level="O1").logits(model, torch.randn(2, 3, 4, 4))
    assert seen == [HALF]


def test_converting_does_not_round_float32_batch_norms() -> None:
    model = small_net()
    model[1].running_mean.fill_(1 / 3)
    Precision.choose(CPU, fp16=True).convert(model)
    assert torch.equal(model[1].running_mean, torch.full((8,), 1 / 3))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), max_size=40), st.integers(1990, 2000))
def test_a_dynamic_scale_moves_as_grad_scalers_does(overflows: list[bool], good_before: int) -> None:
    scaler = torch.amp.GradScaler("cpu")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scale = LossScale(Precision.choose(CPU, dynamic_loss_scale=True))
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": good_before})
    scale.load_state_dict(scale.state_dict() | {"good_steps": good_before})
    for overflow in overflows:
        scaler.scale(parameter.sum()).backward()
        parameter.grad = torch.full((1,), float("inf") if overflow else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scale.update(torch.tensor(float(overflow)))
        assert scale.state_dict() == {"scale": scaler.get_scale(), "good_steps": scaler.state_dict()["_growth_tracker"]}


@settings(deadline=None, max_examples=20)
@given(st.integers(-10, 20))
def test_a_power_of_two_scales_the_gradients_and_leaves_the_steps_alone(exponent: int) -> None:
    results = []
    for scale in (1.0, 2.0**exponent):
        model = small_net()
        optimizer = optimizer_of(model, Precision.choose(CPU, static_loss_scale=scale))
        for seed in range(3):
            backward(model, optimizer, seed)
            gradient = model[4].bias.grad.clone()
            optimizer.step(YES)
        results.append((gradient / scale, snapshot(model, optimizer)))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_that_is_not_finite_leaves_no_trace_at_any_level(level: str, dynamic: bool) -> None:
    outcomes = []
    for verdicts in ([NO, YES, NO, YES], [YES, YES]):
        precision = Precision.choose(CPU, amp=True, opt_level=level, dynamic_loss_scale=dynamic)
        model = precision.convert(small_net())
        optimizer = optimizer_of(model, precision)
        good = 0
        for verdict in verdicts:
            backward(model, optimizer, seed=good)
            assert optimizer.step(verdict).item() == verdict.item()
            good += verdict.item()
        outcomes.append(snapshot(model, optimizer))
    assert same(*outcomes)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_moves_in_a_skipped_step(level: str) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level)
    model = precision.convert(small_net())
    optimizer = optimizer_of(model, precision)
    backward(model, optimizer, 0)
    optimizer.step(YES)
    before = snapshot(model, optimizer)
    backward(model, optimizer, 1)
    assert not optimizer.step(NO)
    assert same(snapshot(model, optimizer), before)
    backward(model, optimizer, 1)
    assert optimizer.step(YES)
    assert not same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("level", ["O2", "O3"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_half_precision_gradient_that_overflowed_after_averaging_skips_the_step(
    level: str, dynamic: bool, bad: float
) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level, dynamic_loss_scale=dynamic)
    model = precision.convert(small_net())
    optimizer = optimizer_of(model, precision)
    before = snapshot(model, optimizer)
    backward(model, optimizer, 0)
    model[0].weight.grad[0, 0, 0, 0] = bad
    assert not optimizer.step(YES)
    assert same(snapshot(model, optimizer), before)
    assert float(optimizer.scale.value) == (2**15 if dynamic else 1)


def test_the_scale_is_halved_by_another_ranks_overflow() -> None:
    precision = Precision.choose(CPU, amp=True, dynamic_loss_scale=True)
    model = small_net()
    optimizer = optimizer_of(model, precision)
    backward(model, optimizer, 0)
    optimizer.step(NO)
    assert optimizer.scale.state_dict()["scale"] == 2**15


def test_a_dynamic_scale_gives_up_once_no_scale_can_help_and_a_static_one_at_once() -> None:
    scale = LossScale(Precision.choose(CPU, dynamic_loss_scale=True))
    halvings = 0
    while scale.can_back_off():
        scale.update(torch.tensor(1.0))
        halvings += 1
    assert halvings == 32
    assert not LossScale(Precision.choose(CPU, static_loss_scale=128)).can_back_off()


def test_a_scale_once_given_out_stays_what_it_was() -> None:
    scale = LossScale(Precision.choose(CPU, dynamic_loss_scale=True))
    given = scale.value
    scale.update(torch.tensor(1.0))
    assert (float(given), float(scale.value)) == (2**16, 2**15)


def test_master_weights_collect_steps_too_small_for_half_precision() -> None:
    precision = Precision.choose(CPU, fp16=True)
    model = precision.convert(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model.weight)
    optimizer = optimizer_of(model, precision, momentum=0.0, weight_decay=0.0)
    for _ in range(64):  # 0.1 x 2^-7 each; bfloat16 knows no number between 1 - 2^-8 and 1
        model.weight.grad = torch.full((1, 1), 2.0**-7, dtype=HALF)
        optimizer.step(YES)
    assert optimizer.state_dict()["masters"]["weight"].item() == pytest.approx(0.95, abs=1e-5)
    assert torch.equal(model.weight, torch.full((1, 1), 0.95, dtype=HALF))


def test_only_half_precision_weights_have_masters() -> None:
    precision = Precision.choose(CPU, fp16=True)
    optimizer = optimizer_of(precision.convert(small_net()), precision)
    assert set(optimizer.state_dict()["masters"]) == {"0.weight", "4.weight", "4.bias"}


@pytest.mark.parametrize("level", LEVELS)
def test_a_parameter_without_gradient_is_left_as_it_is(level: str) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level)
    model = precision.convert(small_net())
    optimizer = optimizer_of(model, precision)
    for seed in range(2):  # the second time, a gradient of the first must not come back
        backward(model, optimizer, seed)
        if seed == 1:
            model[0].weight.grad = None
            before = model[0].weight.detach().clone()
            momentum = optimizer.state_dict()["momentum"]["0.weight"].clone()
        assert optimizer.step(YES)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(optimizer.state_dict()["momentum"]["0.weight"], momentum)


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_step_without_any_gradient_is_applied_and_changes_nothing(level: str) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level, dynamic_loss_scale=True)
    model = precision.convert(small_net())
    optimizer = optimizer_of(model, precision)
    before = snapshot(model, optimizer)
    assert optimizer.step(YES)
    assert same(snapshot(model, optimizer), before)


def test_a_gradient_in_another_memory_format_is_applied_value_by_value() -> None:
    model = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(model, Precision(CPU), weight_decay=0.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.arange(4.0 * 3 * 9).view(4, 3, 3, 3)
    optimizer.step(YES)
    torch.testing.assert_close(model.weight, before - 0.1 * torch.arange(4.0 * 3 * 9).view(4, 3, 3, 3))


def apex_like(groups: list[ParameterGroup]) -> Optimizer:
    """An optimizer that cannot be told to skip on the device."""
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=False)


def test_an_optimizer_that_cannot_skip_on_the_device_gets_the_same_steps() -> None:
    results = []
    for build in (apex_like, partial(sgd, lr=0.1, momentum=0.9)):
        model = small_net()
        precision = Precision.choose(CPU, amp=True, opt_level="O1", dynamic_loss_scale=True)
        optimizer = MixedPrecisionOptimizer(parameter_groups(model, weight_decay=0.01), build, precision)
        for seed, verdict in enumerate([NO, YES, NO, YES]):
            backward(model, optimizer, seed)
            optimizer.step(verdict)
        results.append(snapshot(model, optimizer))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("level", LEVELS)
def test_a_resumed_optimizer_steps_as_if_nothing_had_happened(level: str) -> None:
    precision = Precision.choose(CPU, amp=True, opt_level=level, dynamic_loss_scale=True)
    model = precision.convert(small_net())
    optimizer = optimizer_of(model, precision)
    for seed, verdict in enumerate([YES, NO, YES]):
        backward(model, optimizer, seed)
        optimizer.step(verdict)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model = precision.convert(small_net(seed=1))
    resumed_model.load_state_dict(saved["model"])
    resumed = optimizer_of(resumed_model, precision)
    resumed.load_state_dict(saved["optimizer"])
    for each_model, each in ((model, optimizer), (resumed_model, resumed)):
        backward(each_model, each, 3)
        each.step(YES)
    assert same(snapshot(model, optimizer), snapshot(resumed_model, resumed))
    assert optimizer.scale.state_dict() == resumed.scale.state_dict()


def test_flags_of_the_resumed_run_count_not_those_of_the_saved_one() -> None:
    model = small_net()
    saved = copy.deepcopy(optimizer_of(model, Precision(CPU), weight_decay=0.5).state_dict())
    resumed = optimizer_of(model, Precision(CPU), weight_decay=0.25)
    resumed.set_lr(0.125)
    resumed.load_state_dict(saved)
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.0, 0.25}
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {0.125}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"fp16": True}, r"another masters than this run \(0.weight is in one of them only\); resume with .* `fp16`"),
        ({"dynamic_loss_scale": True}, r"another loss scale .*; resume with `dynamic_loss_scale` if and only if"),
    ],
)
def test_a_state_of_another_precision_is_an_error_that_names_the_options(flags: dict[str, Any], words: str) -> None:
    saved = optimizer_of(small_net(), Precision(CPU)).state_dict()
    precision = Precision.choose(CPU, **flags)
    resumed = optimizer_of(precision.convert(small_net()), precision)
    with pytest.raises(ValueError, match=words):
        resumed.load_state_dict(saved)


def test_a_state_with_other_momentum_is_an_error_that_names_the_options() -> None:
    saved = optimizer_of(small_net(), Precision(CPU), momentum=0.0).state_dict()
    with pytest.raises(ValueError, match=r"another momentum than this run .*resume with the same `arch`, `momentum`"):
        optimizer_of(small_net(), Precision(CPU)).load_state_dict(saved)
