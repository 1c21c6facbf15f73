"""What the optimizers over fused kernels share: calls, the global norm, f32 sums and masters, saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gptcore.optim.slices import StatePlace, Whole, whole_of

# What is trained by an f32 master.
MASTERED = (torch.bfloat16, torch.float16)


Number = float | torch.Tensor
"""A number, or one element on a GPU, which kernels alone read."""


class Call:
    """The tensors of one kernel call: their groups agree in ``settings``, they in device, dtype and ``number``."""

    def __init__(self, settings: tuple[Any, ...], number: int, mastered: bool) -> None:
        self.settings = settings
        self.number = number
        self.mastered = mastered
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.wholes: list[Whole] = []  # what each parameter is a slice of
        self.weight_decay: list[float] = []

    def weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """The f32 tensors to update, and the bf16 ones that are written beside them."""
        if not self.mastered:
            return self.params, None
        return self.list_of("master"), None if self.half else self.params

    @property
    def on_device(self) -> bool:
        """Whether the tensors lie on a GPU, where counts of steps and norms are and stay."""
        return self.params[0].is_cuda

    @property
    def half(self) -> bool:
        """Whether the parameters are f16, which no kernel writes."""
        return self.params[0].dtype == torch.float16

    def list_of(self, name: str) -> list[torch.Tensor]:
        """One tensor of each parameter's state."""
        return [s[name] for s in self.states]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update all parameters of equal settings in one kernel call.

    State is f32 whatever the parameter is. A bf16 parameter has an f32 master in the state, which is what is
    updated; the parameter is its rounding, written in the same pass, that of an f16 parameter after it.

    Of parameters on a GPU nothing is waited for, so that a graph can capture ``step``: state ``step`` lies there,
    ``last_grad_norm`` and ``found_inf`` are tensors of one element (f64 and bool) that whoever looks at them waits
    for, and ``group["lr"]``, ``grad_scale`` and ``grad_norm`` may be such tensors. An ``admit`` is asked by the host,
    which waits.

    A subclass says what makes a call (``_settings``, ``_begin``) and runs it (``_update``), and gives its
    defaults under torch's names, so that saved state goes from one library to the other.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        max_norm: float | None,
        *,
        check_finite: bool = True,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise self._bad("max_norm", max_norm, "a number > 0 or None")
        _refuse_unsupported(type(self).__name__, defaults)
        self.max_norm = max_norm
        self.check_finite = check_finite
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        self.last_grad_norm: Number | None = 0.0
        self.found_inf: bool | torch.Tensor = False
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._summed: set[torch.Tensor] = set()
        self._given: dict[torch.Tensor, torch.Tensor] = {}

    # --- what subclasses define ----------------------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a group whose settings do not fit."""
        raise NotImplementedError

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What the kernel takes once per call: plain numbers, but for what lies on a GPU."""
        raise NotImplementedError

    def _begin(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], whole: Whole) -> int:
        """Fill in what state lacks; a number that must be equal for all tensors of a call. On a GPU no count of
        steps, which the host does not know."""
        raise NotImplementedError

    def _update(
        self, call: Call, max_norm: float | None, grad_scale: Number, grad_norm: Number | None
    ) -> tuple[Number | None, bool | torch.Tensor]:
        """Run the kernel: the norm before clipping, and whether a gradient was not finite."""
        raise NotImplementedError

    def state_place(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> StatePlace:
        """Where state ``key`` of elements ``start`` to ``stop - 1`` of a parameter of ``shape`` lies in that of all."""
        if key == "step":
            return StatePlace(0, 1, (), (), shared=True)
        return StatePlace(start, stop, shape)

    # --- steps ---------------------------------------------------------------------------------------------

    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to f32 sums, which the next ``step`` uses.

        Only bf16 and f16 parameters need it (their gradients are freed here): autograd itself adds up
        f32 gradients, in the order of the calls, and those are left where they are.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.dtype not in MASTERED:
                    continue
                if p not in self._sums:
                    self._sums[p] = torch.empty_like(p, dtype=torch.float32)
                # The buffers are kept over steps; the first micro-batch overwrites what is left in them.
                if p in self._summed:
                    self._sums[p].add_(p.grad)
                else:
                    self._sums[p].copy_(p.grad)
                self._summed.add(p)
                p.grad = None

    def take_gradients(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Gradients, f32 or bf16, that the next ``step`` uses in place of the parameters' own, until ``zero_grad``."""
        self._given = dict(gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and f32 sums."""
        _unwrapped(torch.optim.Optimizer.zero_grad)(self, set_to_none)
        self._summed.clear()
        self._given = {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: Number = 1.0,
        grad_norm: tuple[Number, bool | torch.Tensor] | None = None,
        admit: Callable[[float], bool] | None = None,
    ) -> float | None:
        """One update. Gradients are divided by ``grad_scale`` first (micro-batches, or a loss scale).

        Args:
            closure: computes the loss anew, with gradients; its value is returned.
            grad_norm: ``(norm, found_inf)`` of more gradients than these, where their parameters have several
                optimizers (of ranks that own slices, say): the norm of all of them over ``grad_scale``, before
                clipping, which takes the place of this optimizer's own, and whether one of them was not finite. These
                gradients are not looked through again. Default: of these gradients alone.
            admit: asked with the norm of finite gradients before anything is written; where it answers False,
                nothing is. The bits of an admitted update are those without it.

        Raises:
            ValueError: a ``grad_norm`` beside a closure, or whose norm is not finite though found_inf is False.
        """
        if grad_norm is not None:
            self._check_norm(grad_norm, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._calls()
        self.found_inf = False
        self.last_grad_norm = 0.0
        known: Number | None = None
        if grad_norm is not None:
            known, self.found_inf = grad_norm
        elif admit is not None or (len(calls) > 1 and (self.check_finite or self.max_norm is not None)):
            # Groups that differ in their settings need one call each, but share one norm; so does who is asked first.
            from gptcore.ops.grad_norm import grad_norm as norm_of

            known, self.found_inf = norm_of([g for call in calls for g in call.grads], grad_scale)
        if known is not None:
            self.last_grad_norm = known
            if self._keeps_out(known, admit):
                return loss
        for call in calls:
            self.last_grad_norm, self.found_inf = self._update(call, self.max_norm, grad_scale, known)
            # Masters that were not touched are what their parameters were rounded from.
            if call.half and (call.on_device or not self.found_inf):
                torch._foreach_copy_(call.params, call.list_of("master"))
        return loss

    def _keeps_out(self, norm: Number, admit: Callable[[float], bool] | None) -> bool:
        """Whether the host knows that nothing is to be written; what it does not, kernels look at themselves."""
        if isinstance(self.found_inf, torch.Tensor) and admit is None:
            return False
        return bool(self.found_inf) or (admit is not None and not admit(float(norm)))

    def _calls(self) -> list[Call]:
        calls: dict[tuple[Any, ...], dict[tuple[Any, ...], Call]] = {}
        position = -1
        for group in self.param_groups:
            settings = self._settings(group)
            own = calls.setdefault(settings, {})
            decay = float(group["weight_decay"])
            for p in group["params"]:
                position += 1
                grad = self._given.get(p) if self._given else p.grad
                if self._summed and p in self._summed:
                    grad = self._sums[p]
                if grad is None:
                    continue
                state = self.state[p]
                whole = whole_of(p, position)
                number = self._begin(p, state, group, whole)
                call = own.get((number, p.dtype, p.device))
                if call is None:
                    call = own[number, p.dtype, p.device] = Call(settings, number, p.dtype in MASTERED)
                call.params.append(p)
                if grad.dtype == torch.float16:
                    grad = grad.float()
                call.grads.append(grad.contiguous())  # as torch's own gradients of contiguous parameters are
                call.states.append(state)
                call.wholes.append(whole)
                call.weight_decay.append(decay)
        return [call for own in calls.values() for call in own.values()]

    def _begin_master(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        if p.dtype in MASTERED:
            if "master" not in state:
                state["master"] = p.detach().float().contiguous()
        elif p.dtype != torch.float32:
            name = type(self).__name__
            raise TypeError(
                f"{name}: argument 'params': got {p.dtype}, expected float32, bfloat16 or float16"
            )

    # --- settings and saved state --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's: parameters from now on, with settings of their own where the group names them."""
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        _unwrapped(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        if group.get("capturable") and not all(p.is_cuda for p in group["params"]):
            raise self._bad("capturable", True, "False: on the CPU there is no graph to capture")

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        state: dict[str, Any] = _unwrapped(torch.optim.Optimizer.state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, bit for bit; also what torch's optimizer of this name returned.

        torch's own version casts state to the parameter's dtype, which would round masters and moments
        of bf16 parameters; it is undone here.
        """
        loaded: list[dict[str, Any]] = []
        # Registered last, so it sees what the other hooks have made of the dict.
        hook = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        try:
            _unwrapped(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        finally:
            hook.remove()
        saved = [i for group in loaded[0]["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in loaded[0]["state"].get(i, {}).items():
                if isinstance(value, torch.Tensor):
                    device = step_device(p) if name == "step" else p.device
                    kept = value.detach().to(device, copy=True)
                    self.state[p][name] = kept.float() if kept.is_floating_point() else kept

    def __getstate__(self) -> dict[str, Any]:
        """torch's own leaves out what subclasses add."""
        more = ("max_norm", "check_finite", "_sums", "_summed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in more}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle for a new object, and by torch's load_state_dict for this one."""
        if "_sums" not in self.__dict__:
            self.max_norm, self.check_finite = None, True
            self._reset()
        super().__setstate__(state)

    def _bad(self, argument: str, got: Any, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: argument '{argument}': got {got}, expected {expected}")

    def _check_norm(self, grad_norm: tuple[Number, bool | torch.Tensor], closure: Any) -> None:
        norm, found_inf = grad_norm
        if closure is not None:
            raise self._bad("grad_norm", grad_norm, "None, with a closure that computes other gradients")
        if isinstance(norm, torch.Tensor):
            return  # kernels look at it
        if not found_inf and not 0.0 <= norm < math.inf:
            raise self._bad("grad_norm", grad_norm, "a finite norm >= 0, or found_inf to be True")

    def _check_number(self, group: dict[str, Any], name: str) -> None:
        value = group[name]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise self._bad(name, f"a tensor of {value.numel()} elements", "one number")
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return  # its value is nobody's but the kernels'
        if not 0.0 <= float(value) < math.inf:
            raise self._bad(name, value, "a finite number >= 0")

    def _check_adam(self, group: dict[str, Any]) -> None:
        """The settings of Adam in any of its forms."""
        for name in ("lr", "eps", "weight_decay"):
            self._check_number(group, name)
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise self._bad("betas", betas, "two numbers in [0, 1)")


def plain(value: Number) -> Number:
    """A setting as a number of Python, unless it lies on a GPU."""
    return value if isinstance(value, torch.Tensor) and value.is_cuda else float(value)


def step_device(p: torch.Tensor) -> torch.device:
    """Where a parameter's count of steps lies: beside it on a GPU, as with torch's ``capturable``."""
    return p.device if p.is_cuda else torch.device("cpu")


def count_from_zero(p: torch.Tensor) -> torch.Tensor:
    """State ``step`` of a parameter that has not been updated."""
    return torch.zeros((), dtype=torch.float32, device=step_device(p))


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """torch's method without what keeps its compiler out of it, which loads the compiler to do so: a second and 40 MB
    with the first optimizer of a process."""
    found: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return found


def _refuse_unsupported(name: str, defaults: dict[str, Any]) -> None:
    """torch's switches between its implementations: ours is always fused, over all tensors at once."""
    if defaults.get("differentiable"):
        raise ValueError(
            f"{name}: argument 'differentiable': got True, expected False; "
            f"the fused kernel has no gradient, torch.optim.{name} has"
        )
    if defaults.get("fused") and defaults.get("foreach"):
        raise ValueError(f"{name}: arguments 'fused' and 'foreach': got True for both, expected one of them")
