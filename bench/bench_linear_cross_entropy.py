"""linear_cross_entropy: the vocabulary projection with its loss, logits never whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ON_GPU, PLAIN, Callables, Case, Cost, Target, both_directions


def _modifiers(name: str, target: Target, tokens: int, vocabulary: int) -> dict[str, Any]:
    """The keyword options of a variant; a bias comes with gradients where the case has them."""

    def weights(count: int) -> Any:
        return target.randn(count, dtype="float32").abs() + 0.1

    variants: dict[str, Callable[[], dict[str, Any]]] = {
        "": dict,
        "zloss": lambda: {"z_loss": 1e-4},
        "token_weight": lambda: {"token_weight": weights(tokens)},
        "soft_cap": lambda: {"logit_soft_cap": 30.0},
        "bias": lambda: {"bias": target.randn(vocabulary, grad=True)},
        "entropy": lambda: {"return_entropy": True},
        "class_weight": lambda: {"class_weight": weights(vocabulary), "label_smoothing": 0.1},
    }
    return variants[name]()


def _torch_loss(logits: Any, targets: Any, options: dict[str, Any]) -> Any:
    import torch
    import torch.nn.functional as F

    if (cap := options.get("logit_soft_cap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    w = options.get("token_weight")
    loss = F.cross_entropy(
        logits, targets, weight=options.get("class_weight"), reduction="mean" if w is None else "none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    loss = loss if w is None else (w * loss).sum() / w.sum()
    if z_loss := options.get("z_loss"):
        loss = loss + z_loss * torch.logsumexp(logits, -1).square().mean()
    if not options.get("return_entropy"):
        return loss
    logprobs = torch.log_softmax(logits.detach(), -1)
    return loss, -(logprobs.exp() * logprobs).sum(-1)


def _setup(
    tokens: int, width: int, vocabulary: int, variant: str, *, backward: bool
) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch.nn.functional as F

        from gptcore.ops.linear_cross_entropy import linear_cross_entropy

        targets = target.randint(vocabulary, tokens)
        inputs = [target.randn(tokens, width, grad=True)]
        inputs.append(target.randn(vocabulary, width, grad=True, scale=width**-0.5))
        options = _modifiers(variant, target, tokens, vocabulary)
        if "bias" in options:
            inputs.append(options.pop("bias"))

        def plainly(x: Any, weight: Any, bias: Any = None) -> Any:
            return linear_cross_entropy(x, weight, targets).loss

        def ours(x: Any, weight: Any, bias: Any = None) -> Any:
            out = linear_cross_entropy(x, weight, targets, bias=bias, **options)
            loss = out.loss + out.z_loss if "z_loss" in options else out.loss
            return (loss, out.entropy) if "return_entropy" in options else loss

        def plain(x: Any, weight: Any, bias: Any = None, *, in_f32: bool) -> Any:
            logits = F.linear(x, weight, bias)
            return _torch_loss(logits.float() if in_f32 else logits, targets, options)

        functions: dict[str, Callable[..., Any]] = {
            "gptcore": ours,
            "torch_eager": lambda *tensors: plain(*tensors, in_f32=True),
        }
        if target.dtype != "float32" and "class_weight" not in options:
            functions["torch_bf16_loss_eager"] = lambda *tensors: plain(*tensors, in_f32=False)
        if variant == "zloss":
            functions[PLAIN] = plainly
        return both_directions(functions, inputs, backward=backward)

    return setup


def _cost(tokens: int, width: int, vocabulary: int, *, backward: bool) -> Callable[[int], Cost]:
    """One product forward, two backward; x, weight and their gradients cross memory once."""
    product = 2.0 * tokens * width * vocabulary
    operands = (tokens + vocabulary) * width

    def cost(element: int) -> Cost:
        written = operands * element if backward else 0
        return Cost((3 if backward else 1) * product, (2 if backward else 1) * operands * element, written)

    return cost


SHAPES = (
    (64, 64, 64, ""),
    (1024, 768, 50257, ""),
    (1024, 768, 50257, "zloss"),
    (1024, 768, 50257, "token_weight"),
    (1024, 768, 50257, "soft_cap"),
    (1024, 768, 50257, "bias"),
    (1024, 768, 50257, "entropy"),
    (1024, 768, 50257, "class_weight"),
    (512, 2048, 32000, ""),
)
GPU_SHAPES = ((8192, 4096, 131072, ""), (16384, 768, 50257, ""), (16384, 768, 50257, "zloss"))


def _cases() -> list[Case]:
    cases = []
    for tokens, width, vocabulary, variant in (*SHAPES, *GPU_SHAPES):
        for backward in (False,) if variant == "entropy" else (False, True):  # it has no gradient
            label = f"N{tokens}_C{width}_V{vocabulary}" + (f"_{variant}" if variant else "")
            cases.append(
                Case(
                    f"linear_cross_entropy/{label}/{'forward_backward' if backward else 'forward'}",
                    _setup(tokens, width, vocabulary, variant, backward=backward),
                    _cost(tokens, width, vocabulary, backward=backward),
                    small=tokens == 64,
                    quick=backward and width in (64, 768) and not variant and tokens <= 1024,
                    devices=ON_GPU if tokens >= 8192 else ("cpu",),
                )
            )
    return cases


CASES = _cases()
