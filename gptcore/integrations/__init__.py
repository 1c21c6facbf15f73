"""gptcore under other libraries' programs; importing it changes nothing.

``replace(model)`` puts a live model's modules onto the kernels, ``restore(model)`` back; ``huggingface`` has what is
particular to transformers.
"""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.integrations.swap import Report, replace, restore

__all__ = ["Report", "replace", "restore"]
