import functools
import math

import pytest
import torch
from torch import nn

from image_classification import models
from image_classification.models.initialization import initialize_
from image_classification.models.resnets import SEBottleneck
from image_classification.rows import loaded
from image_classification.torchvision_import import torchvision

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext101-32x4d": 44_177_704,
    "se-resnext101-32x4d": 45_251_128,
    "wide_resnet50": 68_883_240,
    "wide_resnet101": 126_886_696,
    "vgg16": 138_357_544,
    "resnet18_convex": 11_689_512,
}
IN_TORCHVISION = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "wide_resnet50": "wide_resnet50_2",
    "wide_resnet101": "wide_resnet101_2",
    "vgg16": "vgg16",
    "resnet18_convex": "resnet18",
}


@functools.cache
def on_meta(arch: str, num_classes: int = 1000) -> nn.Module:
    """The network's shapes, without its memory."""
    with torch.device("meta"):
        return models.build(arch, num_classes=num_classes)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def seeded(arch: str, config: str = "classic", seed: int = 3, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(arch, config, num_classes)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_the_head_is_what_depends_on_the_number_of_classes_and_nothing_else_does(arch: str) -> None:
    many, few = shapes(on_meta(arch)), shapes(on_meta(arch, 7))
    head = models.head_of(on_meta(arch))
    assert {name for name in many if many[name] != few[name]} == {f"{head}.weight", f"{head}.bias"}


def test_the_table_names_the_eleven_architectures_and_no_other():
    assert set(models.ARCHITECTURES) == set(PARAMETERS)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_every_architecture_has_its_published_number_of_parameters(arch):
    assert sum(parameter.numel() for parameter in on_meta(arch).parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_every_architecture_gives_one_logit_per_class(arch):
    model = on_meta(arch, num_classes=7)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("arch", IN_TORCHVISION)
def test_names_and_shapes_are_torchvisions(arch):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, IN_TORCHVISION[arch])()
    assert shapes(on_meta(arch)) == shapes(theirs)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_outputs_equal_torchvisions_from_its_state_dict(arch, train):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=5)
    ours = models.build(arch, num_classes=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(ours.train(train)(images), theirs.train(train)(images))


def test_a_torchvision_resnet18_loads_into_the_convex_one():
    theirs = torchvision.models.resnet18()
    ours = models.build("resnet18_convex")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(ours(images), theirs.eval()(images))


def test_bottlenecks_stride_on_the_3x3():
    block = on_meta("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize("arch", ["resnext101-32x4d", "se-resnext101-32x4d"])
def test_resnext_has_32_groups_of_4_channels(arch):
    conv = on_meta(arch).layer1[0].conv2
    assert (conv.groups, conv.out_channels // conv.groups) == (32, 4)


def test_se_resnext_is_resnext_plus_two_layers_a_block_that_squeeze_to_16_units():
    ours, plain = shapes(on_meta("se-resnext101-32x4d")), shapes(on_meta("resnext101-32x4d"))
    added = {name: shape for name, shape in ours.items() if name not in plain}
    assert {name: ours[name] for name in plain} == plain
    assert len(added) == 4 * 33
    assert all(".se.fc" in name for name in added)
    assert all(16 in shape[:2] for name, shape in added.items() if name.endswith("weight"))


@pytest.mark.parametrize(("gate", "expected"), [(-1e9, 0.0), (1e9, 1.0)], ids=["closed", "open"])
def test_the_excitation_scales_the_residual_branch_and_nothing_else(gate, expected):
    block = SEBottleneck(512, 128, groups=32, base_width=4).eval()
    plain = torchvision.models.resnet.Bottleneck(512, 128, groups=32, base_width=4).eval()
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if ".fc" not in name})
    nn.init.zeros_(block.se.fc2.weight)
    nn.init.constant_(block.se.fc2.bias, gate)
    features = torch.rand(2, 512, 5, 5)
    assert torch.equal(block(features), plain(features) if expected else features)


def grouped() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv2d(96, 192, 3, groups=8))


def drawn(model: nn.Module, config: str) -> nn.Module:
    torch.manual_seed(5)
    initialize_(model, loaded(models.MODEL_CONFIGS[config]))
    return model


@pytest.mark.parametrize("config", models.MODEL_CONFIGS)
def test_convolutions_have_the_deviation_of_their_config(config):
    for conv in convolutions(drawn(grouped(), config)) + convolutions(seeded("resnet18", config)):
        area = conv.kernel_size[0] * conv.kernel_size[1]
        fan = {
            "classic": conv.out_channels * area,
            "fanin": conv.in_channels // conv.groups * area,
            "grp-fanin": conv.in_channels // conv.groups * area,
            "grp-fanout": conv.out_channels // conv.groups * area,
        }[config]
        # The deviation of n draws is off by 1/sqrt(2n) of itself, one standard deviation; five are never seen.
        assert conv.weight.std().item() == pytest.approx(
            math.sqrt(2 / fan), rel=5 / math.sqrt(2 * conv.weight.numel())
        )


def test_fan_in_is_counted_per_group_already():
    one, other = (drawn(grouped(), config) for config in ("fanin", "grp-fanin"))
    assert torch.equal(one[1].weight, other[1].weight)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (seeded("resnet18", seed=seed).conv1.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_convex_network_trains_its_last_layer_alone():
    model = models.build("resnet18_convex", num_classes=3)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"fc.weight", "fc.bias"}


def test_the_convex_networks_batch_norms_stay_in_eval_mode():
    model = models.build("resnet18_convex", num_classes=3)
    before = {name: value.clone() for name, value in model.named_buffers()}
    for mode in (model, model.train(), model.eval().train()):
        assert mode.training
        assert not any(norm.training for norm in mode.modules() if isinstance(norm, nn.BatchNorm2d))
        mode(torch.randn(2, 3, 40, 40))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_the_convex_networks_loss_is_convex():
    model = seeded("resnet18_convex", num_classes=3)
    images, labels = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 0])
    ends = [torch.randn_like(model.fc.weight) for _ in range(2)]

    def loss(weight: torch.Tensor) -> float:
        with torch.no_grad():
            model.fc.weight.copy_(weight)
            return nn.functional.cross_entropy(model(images).double(), labels).item()

    low, high = loss(ends[0]), loss(ends[1])
    for fraction in (0.1, 0.3, 0.5, 0.9):
        assert loss(ends[0].lerp(ends[1], fraction)) <= low + fraction * (high - low)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet19",), r"unknown architecture 'resnet19'; choose one of resnet18, resnet34, "),
        (("resnet18", "fan"), r"unknown model config 'fan'; choose one of classic, fanin, grp-fanin, grp-fanout"),
        (("resnet18", "classic", 0), r"a classifier has at least 1 class, got num_classes=0"),
    ],
)
def test_a_wrong_argument_is_named_with_what_would_be_right(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.build(*arguments)
