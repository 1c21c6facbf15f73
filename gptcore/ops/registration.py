"""How an op meets torch.

A kernel call has three routes, the cheapest that is right:

- eager without gradients: straight to the extension;
- eager with gradients: one ``autograd.Function`` around it;
- under torch.compile, FakeTensor, functorch or any dispatch mode: the op ``torch.ops.gptcore.<name>``, which
  is functional, has a fake implementation and an autograd formula, and is registered when gptcore.ops is
  imported after torch, else with the first eager call. torch.func's differentiation goes through an
  ``autograd.Function`` around that op.

All three share the same forward and backward functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from gptcore import backend
from gptcore.ops.arrays import is_torch

_torch: Any = None
_library: Any = None
_router: Any = None


def _is_compiling() -> bool:
    return False  # until torch is there, whose function takes this one's place


def _load() -> None:
    global _torch, _library, _router, _is_compiling
    import torch

    native = torch._C
    # A dispatch mode, a function mode or a functorch transform must see every call.
    modes = [
        native._len_torch_dispatch_stack,
        native._len_torch_function_stack,
        native._functorch.peek_interpreter_stack,
    ]
    _torch = torch
    # The cheaper of two such questions: what export traces without dynamo runs under a mode, which is seen below.
    _is_compiling = torch.compiler.is_dynamo_compiling
    _router = functools.partial(
        backend.extension().router, torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled, modes
    )
    _library = torch.library.Library("gptcore", "FRAGMENT")


class TorchOp:
    """A functional op over torch tensors with optional gradient.

    Args:
        name: registered as ``torch.ops.gptcore.<name>``.
        schema: arguments and returns in torch's schema language, without the name.
        forward: computes fresh outputs from real tensors; never returns an input.
        fake: the outputs' shapes and dtypes, from fake tensors.
        setup_context: ``(ctx, inputs, output)``; saves what backward needs.
        backward: ``(ctx, *grads)``; returns one gradient (or None) per input. Both or neither are given.
        inference: like forward, for calls without gradients, where it may skip what only backward needs.
        eager_forward: ``(ctx, *inputs)``, in place of forward and setup_context in the eager Function, where
            a microsecond counts. Its outputs may be fewer than the schema's, one of them bare instead of in a
            tuple; backward must cope with what it saved.
        eager_backward: like backward, for the eager Function without create_graph: may call kernels directly.
        native_hooks: eager_forward and eager_backward are the extension's ``<name>_eager_forward`` and
            ``<name>_eager_backward``, for ops so small that a Python frame counts.
        lower_precision: under autocast, floating tensors are cast to its dtype first, as torch does for
            products.
        takes_half: CUDA's kernel takes f16 too; without it what CUDA's autocast wants in f16 is computed in f32.
        full_precision: places of inputs which autocast leaves as they are.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        inference: Callable[..., Any] | None = None,
        eager_forward: Callable[..., Any] | None = None,
        eager_backward: Callable[..., Any] | None = None,
        native_hooks: bool = False,
        lower_precision: bool = False,
        full_precision: tuple[int, ...] = (),
        takes_half: bool = False,
    ) -> None:
        self.name = name
        self.schema = schema
        self.forward = forward
        self.fake = fake
        self.setup_context = setup_context
        self.backward = backward or self._refuse_backward
        self.inference = inference or forward
        self.eager_forward = eager_forward or self._generic_forward
        self.eager_backward = eager_backward or self.backward
        self.native_hooks = native_hooks
        self.lower_precision = lower_precision
        self.full_precision = full_precision
        self.takes_half = takes_half
        self.overload: Any = None
        self.route: Any = self._register_and_call
        if sys.modules.get("torch"):  # else with the first call; importing gptcore.ops must not import torch
            self.register()

    def register(self) -> None:
        """Define the op in torch's registry, once."""
        if self.overload is not None:
            return
        if _torch is None:
            _load()
        if self.native_hooks:
            extension = backend.extension()
            self.eager_forward = getattr(extension, f"{self.name}_eager_forward")
            self.eager_backward = getattr(extension, f"{self.name}_eager_backward")
        library = _library
        library.define(self.name + self.schema, tags=(_torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            library.impl(self.name, self.forward, key)
        qualified = f"gptcore::{self.name}"
        _torch.library.register_fake(qualified, self.fake, lib=library)
        _torch.library.register_autograd(
            qualified, self.backward, setup_context=self.setup_context, lib=library
        )
        self.overload = getattr(_torch.ops.gptcore, self.name).default
        # The C function behind Function.apply, whose Python half (2 us) only looks for functorch, as the router has.
        apply = super(_torch.autograd.Function, self._autograd_function()).apply  # type: ignore[misc]
        self.route = _router(self.inference, apply, self._dispatched, self.name)

    def _dispatched(self, *inputs: Any) -> Any:
        """Under a mode or a transform: the registered op, but by a Function of ours where torch.func differentiates,
        which the one that torch generates for an op refuses (it has no ``setup_context``)."""
        functorch = _torch._C._functorch
        interpreter = functorch.peek_interpreter_stack()
        if interpreter is None or interpreter.key() != functorch.TransformType.Grad:
            return self.overload(*inputs)
        return self._transformed.apply(*inputs)

    @functools.cached_property
    def _transformed(self) -> Any:
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if self.setup_context is not None:
                self.setup_context(ctx, inputs, output)

        methods = {
            "forward": staticmethod(lambda *inputs: self.overload(*inputs)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(self.backward),
            "generate_vmap_rule": True,  # gradients for each sample
        }
        return type(f"gptcore_{self.name}_transformed", (_torch.autograd.Function,), methods)

    def _register_and_call(self, *inputs: Any) -> Any:
        if not any(map(is_torch, inputs)):
            return self.inference(*inputs)  # without importing torch
        self.register()
        return self(*inputs)

    def _refuse_backward(self, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"gptcore::{self.name} has no derivative: gptcore's kernels are differentiable once; "
            "use the op's reference for higher derivatives"
        )

    def _generic_forward(self, ctx: Any, *inputs: Any) -> Any:
        output = self.forward(*inputs)
        if self.setup_context is not None:
            self.setup_context(ctx, inputs, output)
        return output

    def _autograd_function(self) -> Any:
        backward = self.backward
        once = _torch.autograd.function.once_differentiable(backward)
        is_grad_enabled = _torch.is_grad_enabled
        transform = _torch._C._functorch.peek_interpreter_stack  # autograd.grad(is_grads_batched=True) maps

        def general(ctx: Any, *grads: Any) -> Any:
            # Only create_graph=True runs backward with gradients on; then a second derivative must raise.
            if not is_grad_enabled():
                return backward(ctx, *grads)
            # once_differentiable guards only what depends on grads; the saved tensors must not be forgotten
            # silently when grads are constants, as a scalar loss's are.
            marked = (g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads)
            return once(ctx, *marked)

        methods = {"forward": staticmethod(self.eager_forward), "backward": staticmethod(general)}
        function: Any = type(f"gptcore_{self.name}", (_torch.autograd.Function,), methods)
        # What the engine calls; torch's own version looks up the method above anew in each call.
        function._backward_cls.apply = backend.extension().backward_method(
            self.eager_backward, general, is_grad_enabled, transform
        )
        return function

    def __call__(self, *inputs: Any) -> Any:
        """Run the op by the cheapest right route; without torch tensors among the inputs that is ``inference``.

        Args:
            inputs: all that the schema names, in order.
        """
        if self.lower_precision:
            inputs = _autocast(inputs, self.full_precision, self.takes_half)
        if _is_compiling() and any(map(is_torch, inputs)):
            return self.overload(*inputs)
        return self.route(*inputs)


def _autocast(inputs: tuple[Any, ...], kept: tuple[int, ...], takes_half: bool) -> tuple[Any, ...]:
    if _torch is None or not (_torch.is_autocast_enabled("cpu") or _torch.is_autocast_enabled("cuda")):
        return inputs
    device = next((x.device.type for x in inputs if isinstance(x, _torch.Tensor)), "cpu")
    if not _torch.is_autocast_enabled(device):
        return inputs
    dtype = _torch.get_autocast_dtype(device)
    if device == "cuda" and dtype == _torch.float16 and not takes_half:
        dtype = _torch.float32
    return tuple(
        x.to(dtype)
        if isinstance(x, _torch.Tensor)
        and x.is_floating_point()
        and x.dtype != _torch.float64
        and i not in kept
        else x
        for i, x in enumerate(inputs)
    )


def refuse_out_with_grad(op: str, *tensors: Any) -> None:
    """``out=`` forms are not differentiable; refuse them as torch does.

    Raises:
        RuntimeError: gradients are enabled and a tensor among ``tensors`` requires one.
    """
    if not any(getattr(x, "requires_grad", False) for x in tensors):  # the cheapest question first
        return
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for x in tensors:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise RuntimeError(
                f"{op}: out= does not support automatic differentiation, but an argument requires grad; "
                "call it under torch.no_grad() or without out="
            )
