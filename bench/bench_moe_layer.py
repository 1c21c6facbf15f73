"""A whole mixture-of-experts layer, router to combine, against a loop over experts and transformers' Mixtral block."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bench.case import Callables, Case, Cost, Target, with_gradient

TOKENS, WIDTH, HIDDEN, TOP_K = 4096, 768, 3072, 2
# transformers' own ways through the experts.
IMPLEMENTATIONS = ("eager", "grouped_mm")


def _gptcore(router: Any, up: Any, down: Any) -> Callable[..., Any]:
    import torch

    from gptcore.nn import MoE

    layer = MoE(WIDTH, HIDDEN, router.shape[0], TOP_K, device="meta")
    layer.router.weight, layer.up.weight, layer.down.weight = map(torch.nn.Parameter, (router, up, down))

    def run(x: Any, *weights: Any) -> Any:
        return torch.func.functional_call(layer, _named(layer, weights), (x,)).output

    return run


def _named(layer: Any, weights: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((name for name, _ in layer.named_parameters()), weights, strict=True))


def _loop(x: Any, router: Any, up: Any, down: Any) -> Any:
    """Each expert's tokens in turn, over weights unbound once."""
    import torch

    flat = x.view(-1, WIDTH)
    gates, experts = (flat.float() @ router.float().t()).softmax(-1).topk(TOP_K)
    gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)
    places = experts.flatten().argsort(stable=True)
    sizes = torch.bincount(experts.flatten(), minlength=router.shape[0]).tolist()
    out = torch.zeros_like(flat)
    by_expert = zip(places.split(sizes), up.unbind(0), down.unbind(0), strict=True)
    for place, wide, narrow in by_expert:
        tokens = place // TOP_K
        gate, value = torch.mm(flat.index_select(0, tokens), wide.t()).chunk(2, -1)
        rows = torch.mm(torch.nn.functional.silu(gate) * value, narrow.t())
        out = out.index_add(0, tokens, rows * gates.flatten()[place, None])
    return out.view(x.shape)


def _mixtral(implementation: str, router: Any, up: Any, down: Any) -> Callable[..., Any]:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=router.shape[0],
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = torch.nn.Parameter(router)
    block.experts.gate_up_proj, block.experts.down_proj = map(torch.nn.Parameter, (up, down))

    def run(x: Any, *weights: Any) -> Any:
        return torch.func.functional_call(block, _named(block, weights), (x,))

    return run


def _setup(experts: int, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        x = target.randn(1, TOKENS, WIDTH, grad=backward)
        weights = [
            target.randn(*shape, scale=shape[-1] ** -0.5, grad=backward)
            for shape in ((experts, WIDTH), (experts, 2 * HIDDEN, WIDTH), (experts, WIDTH, HIDDEN))
        ]
        grad = target.randn(1, TOKENS, WIDTH)
        given = [w.detach() for w in weights]
        functions = {"gptcore": _gptcore(*given), "torch_loop_eager": _loop}
        if importlib.util.find_spec("transformers"):
            for name in IMPLEMENTATIONS:
                functions[f"transformers_{name}_eager"] = _mixtral(name, *given)

        def call(function: Callable[..., Any]) -> Callable[[], Any]:
            if backward:
                return with_gradient(function, [x, *weights], grad)

            def forward() -> Any:
                with torch.no_grad():
                    return function(x, *weights)

            return forward

        return {name: call(function) for name, function in functions.items()}

    return setup


def _cost(experts: int, backward: bool) -> Callable[[int], Cost]:
    """Products of the experts; their weights once each way, and tokens in and out."""

    def cost(element: int) -> Cost:
        flops, weights = 6.0 * TOKENS * TOP_K * WIDTH * HIDDEN, 3 * experts * WIDTH * HIDDEN * element
        tokens = TOKENS * WIDTH * element
        if not backward:
            return Cost(flops, weights + tokens, tokens)
        return Cost(3 * flops, 2 * weights + 2 * tokens, weights + 2 * tokens)

    return cost


CASES = [
    Case(
        f"moe_layer/N{TOKENS}_C{WIDTH}_F{HIDDEN}_E{experts}_K{TOP_K}/{'forward_backward' if backward else 'forward'}",
        _setup(experts, backward),
        _cost(experts, backward),
        repeats=5,
        # transformers' eager loop makes a gradient of all experts' size for each expert: minutes with 64.
        quick="bfloat16" if not backward or experts == 8 else False,
        tokens=TOKENS,
    )
    for backward in (False, True)
    for experts in (8, 64)
]
