"""Gradients of a model that is cut over a tensor group, each of whose ranks divides its slices further."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.dist.group import Member
from gptcore.dist.tensor_shard import tensor_shards
from gptcore.optim.zero_layout import Layout


class CutGradients:
    """Which gradients of a module cut by ``tensor_parallel`` count on this rank, so that each counts once over all
    ranks of its tensor group; of a module that is not cut, all do.

    ``tensor``: this rank in the tensor group.

    Raises:
        ValueError: several ranks of that group share optimizer states: they have different slices.
    """

    def __init__(self, module: nn.Module | None, member: Member) -> None:
        shards = {} if module is None else tensor_shards(module)
        named = {} if module is None else dict(module.named_parameters())
        self._shards = {named[name]: shard for name, shard in shards.items()}
        self._masks: dict[nn.Parameter, Tensor] = {}
        self.tensor = Member(None, 0, 1)
        for name, shard in shards.items():
            self.tensor = shard.member
            own = set() if member.group is None else set(c10d.get_process_group_ranks(member.group))
            if len(own & set(c10d.get_process_group_ranks(shard.member.group))) > 1:
                raise ValueError(
                    f"ZeroOptimizer: argument 'group': got one with several ranks among which '{name}' is cut, "
                    "expected one of ranks that have the same slices"
                )

    def counted(self, gradients: Mapping[Tensor, Tensor], layout: Layout) -> list[Tensor]:
        """Of the gradients of parts of parameters."""
        if not self._shards:
            return list(gradients.values())
        found = []
        for part, p in layout.wholes():
            if part not in gradients:
                continue
            shard = self._shards.get(p)
            if shard is None:  # all ranks have it
                found += [gradients[part]] if self.tensor.rank == 0 else []
            elif shard.is_first_with_its_own:
                found.append(gradients[part])
            else:
                start = layout.pieces[part][1].start
                found.append(gradients[part] * self._mask(p, part.device)[start : start + part.numel()])
        return found

    def _mask(self, p: nn.Parameter, device: torch.device) -> Tensor:
        """(elements,) f32: 1 for what no rank before this one has too, 0 for the rest."""
        if p not in self._masks:
            mask = torch.zeros(p.shape, device=device)
            for view in self._shards[p].counted_here(mask):
                view.fill_(1.0)
            self._masks[p] = mask.reshape(-1)
        return self._masks[p]
