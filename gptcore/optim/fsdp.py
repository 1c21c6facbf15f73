"""One of our optimizers over a model that torch's FSDP2 (``fully_shard``) has divided among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptcore.dist import Member
from gptcore.optim.adamw import Adam
from gptcore.optim.fused import MASTERED, FusedOptimizer
from gptcore.optim.sgd import SGD
from gptcore.optim.slices import Whole
from gptcore.optim.zero_layout import Owned
from gptcore.optim.zero_sums import norm_of_all

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class FSDPOptimizer(torch.optim.Optimizer):
    """``optimizer`` on this rank's rows of parameters that ``torch.distributed.fsdp.fully_shard`` made DTensors.

    ::

        for block in model.stack.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer = FSDPOptimizer(AdamW(decay_groups(model, 0.1), lr=3e-4, max_norm=1.0), model)
        for batch in loader:                      # of this rank
            model(*batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    FSDP2 cuts every parameter by rows and leaves each rank the mean gradient of its own, so what works element by
    element is whole here: SGD, Adam and AdamW in all their forms, f32 masters of bf16 and f16 weights among them. The
    norm for ``max_norm`` is that of all ranks' gradients, the same number on each.

    ``state_dict`` is this rank's, for a job with as many ranks; the checkpoints of ``gptcore train`` know no number.

    Args:
        optimizer: SGD, Adam or AdamW of ours over the parameters of ``module``, made after ``fully_shard``, that has
            not stepped yet; it goes on to work on this rank's slices.
        module: the model, whose names name states.

    Raises:
        TypeError: another optimizer. Adafactor's sums go over whole matrices and 8-bit moments have a scale for 256
            elements, which these slices cut anywhere; ``ZeroOptimizer`` divides both.
        ValueError: an optimizer that has stepped; a parameter that is no DTensor sharded over its first dimension and
            one mesh dimension, as ``fully_shard`` has it by default.
    """

    def __init__(self, optimizer: FusedOptimizer, module: nn.Module) -> None:
        if not isinstance(optimizer, (Adam, SGD)):
            raise TypeError(
                f"FSDPOptimizer: argument 'optimizer': got {type(optimizer).__name__}, expected SGD, Adam or AdamW of "
                "gptcore.optim, which work element by element; ZeroOptimizer divides the others"
            )
        if optimizer.state:
            raise ValueError(
                "FSDPOptimizer: argument 'optimizer': got one that has stepped, expected a new one"
            )
        self.optimizer: FusedOptimizer = optimizer
        super().__init__([dict(group) for group in optimizer.param_groups], optimizer.defaults)
        self.last_grad_norm: float | None = 0.0
        self.found_inf = False
        self._names = {p: name for name, p in module.named_parameters()}
        self._starts = {p: self._start_of(p) for group in self.param_groups for p in group["params"]}
        self.member = self._member()
        self._hand_slices_to_optimizer()
        self._sums: dict[Tensor, Tensor] = {}

    def _start_of(self, p: nn.Parameter) -> int:
        """The first element that this rank has of ``p``, flattened."""
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not isinstance(p, DTensor) or p.placements != (Shard(0),):
            got = f"placements {p.placements}" if isinstance(p, DTensor) else type(p).__name__
            raise ValueError(
                f"FSDPOptimizer: argument 'optimizer': got {got} of '{self._names.get(p)}', expected DTensors sharded "
                "over the first dimension; make the optimizer after fully_shard"
            )
        _, first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        return int(first[0]) * (p.numel() // max(1, p.shape[0]))

    def _member(self) -> Member:
        """This rank among those that share the parameters."""
        mesh = next(iter(self._starts)).device_mesh  # type: ignore[attr-defined]
        return Member(mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def _hand_slices_to_optimizer(self) -> None:
        """The wrapped optimizer has this rank's elements for parameters from now on; of some there may be none."""
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        for number, (p, start) in enumerate(self._starts.items()):
            part = nn.Parameter(_local(p).reshape(-1))
            part.whole = Whole(p.numel(), tuple(p.shape), start, number)  # type: ignore[attr-defined]
            if part.numel():
                self._parts[p] = part
        for group in self.optimizer.param_groups:
            group["params"] = [self._parts[p] for p in group["params"] if p in self._parts]

    def owned(self, *, whole_parts: bool = False) -> Iterator[Owned]:
        """What this rank has of every parameter, as :meth:`ZeroOptimizer.owned` gives it."""
        for p, part in self._parts.items():
            start = self._starts[p]
            yield Owned(self._names[p], p, start, start + part.numel(), part.detach(), part, start)

    def exchange(self, optimizer: FusedOptimizer) -> None:
        """Go on with another optimizer over the slices that the present one has, in the same groups."""
        self.optimizer = optimizer
        for outer, inner in zip(self.param_groups, optimizer.param_groups, strict=True):
            parameters = outer["params"]
            outer.clear()
            outer.update({**inner, "params": parameters})

    def trained(self) -> set[nn.Parameter]:
        """The parameters that are divided and updated."""
        return set(self._starts)

    def weights_changed(self) -> None:
        """Nothing: FSDP2 gathers weights when it needs them."""

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to f32 sums, which the next ``step`` uses.

        Only bf16 and f16 parameters need it: FSDP2 itself adds up f32 gradients.
        """
        for p, part in self._parts.items():
            if p.grad is not None and p.dtype in MASTERED:
                gradient = _local(p.grad).reshape(-1)
                if part in self._sums:
                    self._sums[part].add_(gradient)
                else:
                    self._sums[part] = gradient.float()
        for p in self._starts:
            if p.dtype in MASTERED:
                p.grad = None

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        admit: Callable[[float], bool] | None = None,
    ) -> float | None:
        """One update, made by all ranks together. Gradients, means over ranks already, are divided by ``grad_scale``.

        Args:
            closure: computes the loss anew, with gradients; its value is returned.
            admit: asked with the norm of finite gradients, which is the same on all ranks, before anything is written;
                where it answers False, nothing is.
        """
        grad_scale = float(grad_scale)  # ranks agree on numbers of the host
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        norm, self.found_inf = norm_of_all([*gradients.values()], grad_scale, self.member)
        self.last_grad_norm = norm
        if not self.found_inf and (admit is None or admit(norm)):
            for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
                inner.update({key: value for key, value in outer.items() if key != "params"})
            self.optimizer.take_gradients(gradients)
            if gradients:
                self.optimizer.step(grad_scale=grad_scale, grad_norm=(norm, False))
            self.optimizer.zero_grad()
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """By this rank's slices, f32 or bf16."""
        found = dict(self._sums)
        for p, part in self._parts.items():
            if p.grad is not None and part not in found:
                gradient = _local(p.grad).reshape(-1)
                found[part] = gradient.float() if gradient.dtype == torch.float16 else gradient
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and f32 sums."""
        super().zero_grad(set_to_none)
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """This rank's, of its slices."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave on this rank."""
        self.optimizer.load_state_dict(state_dict)


def _local(tensor: Any) -> Tensor:
    """This rank's elements, without their tape."""
    sharded: DTensor = tensor.detach()
    return sharded.to_local()
