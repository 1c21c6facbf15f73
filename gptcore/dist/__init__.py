"""Training over several processes, on torch.distributed's process groups: experts spread over ranks, matrices cut over
them, and what goes with it (docs/scaling.md)."""

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.dist.collectives import exchange_rows, gather_rows
from gptcore.dist.experts import expert_parallel
from gptcore.dist.full_state import full_state_dict, load_full_state_dict
from gptcore.dist.gradients import average_gradients, clip_gradients
from gptcore.dist.group import Member, agree, gather_numbers, member_of
from gptcore.dist.shard import Shard
from gptcore.dist.tensor_parallel import TensorSplit, tensor_parallel
from gptcore.dist.tensor_shard import TensorShard

__all__ = [
    "Member", "Shard", "TensorShard", "TensorSplit", "agree", "average_gradients", "clip_gradients", "exchange_rows",
    "expert_parallel", "full_state_dict", "gather_numbers", "gather_rows", "load_full_state_dict", "member_of",
    "tensor_parallel",
]  # fmt: skip
