"""The optimizers whose parameters are slices of a model's, each rank having its own."""

from gptcore.optim.fsdp import FSDPOptimizer
from gptcore.optim.zero import ZeroOptimizer

Divided = ZeroOptimizer | FSDPOptimizer
