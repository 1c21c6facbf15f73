"""ZeRO: optimizer states, gradients and weights divided over the ranks of a group, around any of our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.dist.group import Member, agree, member_of
from gptcore.dist.shard import sharded_parameters
from gptcore.dist.unit_gradients import Leaves
from gptcore.optim import zero_whole
from gptcore.optim.adafactor import Adafactor
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.zero_backward import Backward
from gptcore.optim.zero_layout import Layout, Owned
from gptcore.optim.zero_offload import HostParts
from gptcore.optim.zero_sums import norm_of_all, step_in_phases
from gptcore.optim.zero_tensor import CutGradients


class ZeroOptimizer(torch.optim.Optimizer):
    """``optimizer`` with its states, and by ``stage`` more, divided over the ranks of ``group``.

    ::

        optimizer = ZeroOptimizer(AdamW(decay_groups(model, 0.1), lr=3e-4, max_norm=1.0), stage=2, module=model)
        for batch in loader:                      # of this rank
            model(*batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    With P parameters, N ranks, bytes for f32 weights under AdamW (Rajbhandari et al. 2020, section 5):

    === ============================================== ==================================================
    0   nothing is divided: data parallel training     16 P
    1   states                                         8 P + 8 P / N
    2   states and gradients                           4 P + 12 P / N
    3   states, gradients and weights                  16 P / N, and the weights of two blocks and the root
    === ============================================== ==================================================

    Each backward pass is a leaf. Leaves are summed in f32 in a fixed binary tree over their numbers (:meth:`leaves`
    says which a rank has), and everything that looks at many gradients at once, as the norm, goes by fixed blocks: so
    the weights after a step have the same bits for any number of ranks that divides the leaves, and for any stage. A
    backward pass must itself give the same bits on every rank, as our models do. A parameter that a leaf did not use
    counts as zero there, and one that no leaf of any rank used is left alone.

    ``step`` divides gradients by the number of ranks, as ``DistributedDataParallel`` does, and by ``grad_scale``; so
    for a mean over ``accumulation`` leaves give that. Clipping is the optimizer's ``max_norm``: parameters have no
    ``grad``, and ``torch.nn.utils.clip_grad_norm_`` would find nothing. Its norm is of all slices, those of other ranks
    of a tensor group among them where ``module`` is cut by ``tensor_parallel``.

    Args:
        optimizer: one of ours that has not stepped yet; it goes on to work on this rank's slices.
        stage: 0 to 3.
        module: the model, the same on all ranks; its parameters' names name states, and stage 3 needs it: its blocks
            (elements of its outermost ``ModuleList``s) are gathered when they run, the rest when it does.
        group: a process group; None: all processes, or this process alone where torch.distributed is not initialised.
        accumulation: backward passes of a step on each rank. Stages 0 and 1 add them up where they are made and send
            sums once; stages 2 and 3 send each, since no rank keeps a whole gradient.
        fixed_tree: False adds leaves as they come: one sum instead of several. In stages 2 and 3 that is the order of
            their numbers, whatever the ranks; in stages 0 and 1 a rank's leaves, then the ranks' sums, so that the bits
            depend on the number of ranks.
        bucket: elements of gradient that are sent together, about.
        offload: of a model on a GPU keep states, masters and a copy of the weights that this rank owns in host memory,
            and update them there (Ren et al. 2021, "ZeRO-Offload", section 4): summed gradients come down, weights go
            up. Load weights before this optimizer is made: it writes its copies over the model's. The same bits.

    Raises:
        TypeError: an optimizer that is none of ours.
        ValueError: one that has stepped; a stage, a module or a number that does not fit; ranks that differ.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        *,
        stage: int = 1,
        module: nn.Module | None = None,
        group: Any = None,
        accumulation: int = 1,
        fixed_tree: bool = True,
        bucket: int = 8 << 20,
        offload: bool = False,
    ) -> None:
        _check(optimizer, stage, module, accumulation, bucket)
        single = group is None and not (c10d.is_available() and c10d.is_initialized())
        self.member = Member(None, 0, 1) if single else member_of("ZeroOptimizer", group)
        self._cut = CutGradients(module, self.member)
        self.stage, self.module, self.optimizer = stage, module, optimizer
        self.accumulation, self.fixed_tree = accumulation, fixed_tree
        super().__init__([dict(group) for group in optimizer.param_groups], optimizer.defaults)
        self.last_grad_norm: float | None = 0.0
        self.found_inf = False
        self._agree()
        self._layout = Layout(self._parameters(), optimizer, self.member, stage, module, bucket)
        self.units = self._layout.units
        if module is not None and (weights := self._layout.weights) is not None:
            module.register_forward_pre_hook(lambda module, inputs: weights.forward_begins())
        self._host = HostParts() if offload else None
        self._layout.hand_to(optimizer, nn.Parameter if self._host is None else self._host.part)
        self._backward = Backward(self._layout, self.member, self._leaves)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _agree(self) -> None:
        """All ranks have the same to divide."""
        if self.member.ranks == 1:
            return
        parameters = self._parameters()
        same = {
            "stage": self.stage, "accumulation": self.accumulation, "fixed_tree": self.fixed_tree,
            "parameters": len(parameters), "elements": sum(p.numel() for p in parameters),
            "trainable": sum(p.requires_grad for p in parameters),
        }  # fmt: skip
        agree("ZeroOptimizer", self.member, same)

    # --- what is where ---------------------------------------------------------------------------------------

    def owned(self, *, whole_parts: bool = False) -> Iterator[Owned]:
        """What this rank answers for: of every element of every trained parameter one rank does.

        ``whole_parts``: instead what its optimizer works on, which in stage 0 is everything.
        """
        return self._layout.owned(self._names(), whole_parts)

    def _names(self) -> dict[nn.Parameter, str]:
        """Of all parameters: the module's, or for want of it their numbers."""
        names = {} if self.module is None else {p: name for name, p in self.module.named_parameters()}
        return {p: names.get(p, f"parameter{i}") for i, p in enumerate(self._parameters())}

    def exchange(self, optimizer: FusedOptimizer) -> None:
        """Go on with another optimizer over the slices that the present one has, in the same groups."""
        self.optimizer = optimizer
        for outer, inner in zip(self.param_groups, optimizer.param_groups, strict=True):
            parameters = outer["params"]
            outer.clear()
            outer.update({**inner, "params": parameters})

    def trained(self) -> set[nn.Parameter]:
        """The parameters that are divided and updated."""
        return set(self._layout.places)

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Give all ranks what each has written to the weights that it owns; every rank calls it."""
        if self._host is not None:
            self._host.up()
        if self._layout.weights is not None:
            self._layout.weights.free()
        elif self.stage > 0:
            for unit in self.units:
                unit.start_gather()
            for unit in self.units:
                unit.wait()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights, on every rank, for reading; every rank enters it."""
        weights = self._layout.weights
        if weights is None:
            yield
            return
        weights.gather()
        try:
            yield
        finally:
            weights.free()

    def leaves(self, rank: int | None = None) -> range:
        """The numbers, from 0, of the leaves of an update that are ``rank``'s (this one's), in the order in which it
        runs them: neighbours in stages 0 and 1, every N-th of N ranks' in stages 2 and 3."""
        return self._leaves().of_rank(self.member.rank if rank is None else rank)

    def _leaves(self) -> Leaves:
        return Leaves(self.member.ranks, self.accumulation, self.fixed_tree, self.stage >= 2)

    # --- the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        admit: Callable[[float], bool] | None = None,
    ) -> float | None:
        """One update, made by all ranks together. Gradients are divided by the number of ranks and ``grad_scale``.

        Args:
            closure: computes the loss anew, with gradients; its value is returned.
            admit: asked with the norm of finite gradients, which is the same on all ranks, before anything is written;
                where it answers False, nothing is.

        Raises:
            RuntimeError: fewer backward passes than ``accumulation`` since the last step.
        """
        grad_scale = float(grad_scale)  # ranks agree on numbers of the host
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward.done != self.accumulation:
            raise RuntimeError(
                f"ZeroOptimizer.step: got {self._backward.done} backward passes since the last step, "
                f"expected {self.accumulation}"
            )
        scale = grad_scale * self.member.ranks
        gradients = self._backward.sums()
        if self._host is not None:
            gradients = self._host.down(gradients)
        # In stage 0 every rank has all gradients.
        owners = self.member if self.stage else Member(None, 0, 1)
        counted = self._cut.counted(gradients, self._layout)
        norm, self.found_inf = norm_of_all(counted, scale, owners, self._cut.tensor)
        self.last_grad_norm = norm
        if not self.found_inf and (admit is None or admit(norm)):
            self._update(gradients, norm, scale)
        self._backward.begin_step()
        return loss

    def _update(self, gradients: dict[Tensor, Tensor], norm: float, scale: float) -> None:
        for outer, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        self.optimizer.take_gradients(gradients)
        if isinstance(self.optimizer, Adafactor) and self.member.ranks > 1 and self.stage > 0:
            step_in_phases(self.optimizer, norm, scale, self.member)
        else:
            self.optimizer.step(grad_scale=scale, grad_norm=(norm, False))
        self.optimizer.zero_grad()
        self.weights_changed()

    # --- saved state -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer in one process, whole, on every rank: every rank calls it.

        It knows nothing of ranks or stages: any number of them takes it back, at any stage, and so does the plain
        optimizer. States are in host memory, all of them on each rank: 8 bytes a parameter under AdamW, 12 with
        masters. (The checkpoints of ``gptcore train`` gather nothing.) Of a model cut by ``tensor_parallel`` they are
        those of this rank's slices.
        """
        saved = super().state_dict()
        saved["state"] = zero_whole.gathered(self, self.member, self._numbers())
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's slices of what :meth:`state_dict` gave, or the wrapped optimizer's in one process.

        Weights are the model's: load them before this optimizer is made.

        Raises:
            ValueError: groups or states of another shape.
        """
        states = zero_whole.slices(self, self._numbers(), state_dict["state"])
        super().load_state_dict({**state_dict, "state": {}})
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names().values())}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those of leaves since the last step among them; all ranks call it."""
        super().zero_grad(set_to_none)
        self._backward.forget()


def _check(optimizer: Any, stage: int, module: Any, accumulation: int, bucket: int) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"ZeroOptimizer: argument 'optimizer': got {type(optimizer).__name__}, expected one of gptcore.optim"
        )
    if optimizer.state:
        raise ValueError("ZeroOptimizer: argument 'optimizer': got one that has stepped, expected a new one")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeroOptimizer: argument 'stage': got {stage}, expected 0, 1, 2 or 3")
    if module is not None and sharded_parameters(module):
        name = next(iter(sharded_parameters(module)))
        raise ValueError(
            f"ZeroOptimizer: argument 'module': got a slice of '{name}', expected all of every parameter on every "
            "rank; experts spread over ranks are not divided further"
        )
    if stage == 3 and module is None:
        raise ValueError(
            "ZeroOptimizer: argument 'module': got None, expected the model, whose weights stage 3 divides"
        )
    for name, value in (("accumulation", accumulation), ("bucket", bucket)):
        if value < 1:
            raise ValueError(f"ZeroOptimizer: argument '{name}': got {value}, expected 1 or more")
