"""The module of tests/simt itself, for its checks of single instructions and faults."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
from types import ModuleType


@functools.cache
def simt_module() -> ModuleType:
    """_C_simt of the build that GPTCORE_SIMT names."""
    path = glob.glob(os.path.join(os.environ["GPTCORE_SIMT"], "_C_simt*.so"))[0]
    spec = importlib.util.spec_from_file_location("_C_simt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
