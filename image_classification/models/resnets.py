"""Residual networks that torchvision does not have, in torchvision's own layout."""

from typing import Any

from torch import Tensor, nn

from image_classification.torchvision_import import torchvision

_resnet: Any = torchvision.models.resnet

_SQUEEZED_UNITS = 16


class SEBottleneck(_resnet.Bottleneck):
    """A bottleneck whose last feature maps are scaled by what they hold over the whole image.

    Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507) with 16 hidden units in every block, where the
    paper takes a sixteenth of the block's channels. To the names of torchvision's Bottleneck it adds `se.fc1`
    and `se.fc2`.
    """

    def __init__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = torchvision.ops.SqueezeExcitation(planes * self.expansion, _SQUEEZED_UNITS)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return self.relu(out + identity)


class ConvexResNet(_resnet.ResNet):
    """A residual network of which only `fc` trains: logistic regression on fixed features, a convex problem.

    Batch norms stay in eval mode whatever `train()` is told; else the features would depend on the batch and
    the loss would be another function at every step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)
        self.fc.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> "ConvexResNet":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def resnext101_32x4d(num_classes: int) -> nn.Module:
    return _resnet.ResNet(_resnet.Bottleneck, [3, 4, 23, 3], num_classes, groups=32, width_per_group=4)


def se_resnext101_32x4d(num_classes: int) -> nn.Module:
    return _resnet.ResNet(SEBottleneck, [3, 4, 23, 3], num_classes, groups=32, width_per_group=4)


def resnet18_convex(num_classes: int) -> nn.Module:
    return ConvexResNet(_resnet.BasicBlock, [2, 2, 2, 2], num_classes)
