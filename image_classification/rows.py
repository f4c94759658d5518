"""Rows of tables: functions, or their names, which are loaded on use.

A table of names can be listed in no time; what stands behind them may need torch, torchvision or a GPU.
"""

import pkgutil
from typing import Any


def loaded(row: Any) -> Any:
    """A row itself, or the object that a row "package.module:name" names."""
    return pkgutil.resolve_name(row) if isinstance(row, str) else row
