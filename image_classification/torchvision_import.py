"""The one place that imports torchvision: `from image_classification.torchvision_import import torchvision`.

The wheel's compiled library needs libtorch_cuda.so. Beside a CPU-only torch it is skipped without a word, and
the import then fails because nobody declared the operators that torchvision registers fake kernels for. We
declare those two ourselves. Models, transforms and folders work; `ops.nms` and `io.decode_jpeg` do not.
"""

import importlib
import sys
from types import ModuleType

import torch

_UNDECLARED = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _import_torchvision() -> tuple[ModuleType, torch.library.Library | None]:
    """torchvision, and the library object that keeps its operators declared for as long as it lives."""
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError as error:
        if _UNDECLARED not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    return importlib.import_module("torchvision"), library


torchvision, _library = _import_torchvision()
