"""A whole mixture-of-experts layer, router to combine, against a loop over experts and transformers' Mixtral block."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bench.case import OURS, PLAIN, Callables, Case, Cost, Target, with_gradient

TOKENS, WIDTH, HIDDEN, TOP_K = 4096, 768, 3072, 2
FEW_TOKENS = 16  # as in decoding


def _implementations(tokens: int, experts: int, backward: bool) -> list[str]:
    """transformers' own ways through the experts that run here: not deepgemm and sonicmoe, which are for GPUs.

    batched_mm copies its expert's weights for each choice, 116 GB of bf16 for 4096 tokens. The eager loop makes a
    gradient of all experts' size for each expert, which takes many seconds with 64.
    """
    names = ["grouped_mm"]
    if not (backward and experts > 8):
        names.append("eager")
    if tokens <= FEW_TOKENS and not backward:
        names.append("batched_mm")
    return names


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


def _weights(target: Target, experts: int, backward: bool) -> list[Any]:
    shapes = ((experts, WIDTH), (experts, 2 * HIDDEN, WIDTH), (experts, WIDTH, HIDDEN))
    return [target.randn(*shape, scale=shape[-1] ** -0.5, grad=backward) for shape in shapes]


def _call(function: Callable[..., Any], inputs: list[Any], grad: Any, backward: bool) -> Callable[[], Any]:
    import torch

    if backward:
        return with_gradient(function, inputs, grad)

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return forward


def _setup(tokens: int, experts: int, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        x = target.randn(1, tokens, WIDTH, grad=backward)
        weights = _weights(target, experts, backward)
        grad = target.randn(1, tokens, WIDTH)
        given = [w.detach() for w in weights]
        functions = {"gptcore": _gptcore(*given), "torch_loop_eager": _loop}
        if importlib.util.find_spec("transformers"):
            for name in _implementations(tokens, experts, backward):
                functions[f"transformers_{name}_eager"] = _mixtral(name, *given)

        return {name: _call(run, [x, *weights], grad, backward) for name, run in functions.items()}

    return setup


def _setup_of_both(backward: bool) -> Callable[[Target], Callables]:
    """64 experts, and 8 of as many tokens and flops, in turn: between processes the ratio would be that of what the
    memory gave in their minutes."""

    def setup(target: Target) -> Callables:
        x, grad = target.randn(1, TOKENS, WIDTH, grad=backward), target.randn(1, TOKENS, WIDTH)

        def layer(experts: int) -> Callable[[], Any]:
            weights = _weights(target, experts, backward)
            return _call(_gptcore(*(w.detach() for w in weights)), [x, *weights], grad, backward)

        return {OURS: layer(64), PLAIN: layer(8)}

    return setup


def _cost(tokens: int, experts: int, backward: bool) -> Callable[[int], Cost]:
    """Products of the experts; the weights of those chosen once each way, and tokens in and out."""

    def cost(element: int) -> Cost:
        flops = 6.0 * tokens * TOP_K * WIDTH * HIDDEN
        weights = 3 * min(experts, tokens * TOP_K) * WIDTH * HIDDEN * element
        rows = tokens * WIDTH * element
        if not backward:
            return Cost(flops, weights + rows, rows)
        return Cost(3 * flops, 2 * weights + 2 * rows, weights + 2 * rows)

    return cost


def _case(tokens: int, experts: int, backward: bool) -> Case:
    way = "forward_backward" if backward else "forward"
    quick = tokens == TOKENS and not (backward and experts > 8)
    return Case(
        f"moe_layer/N{tokens}_C{WIDTH}_F{HIDDEN}_E{experts}_K{TOP_K}/{way}",
        _setup(tokens, experts, backward),
        _cost(tokens, experts, backward),
        repeats=5,
        quick="bfloat16" if quick else False,
        tokens=tokens,
    )


def _case_of_both(backward: bool) -> Case:
    way = "forward_backward" if backward else "forward"
    return Case(
        f"moe_layer/N{TOKENS}_C{WIDTH}_F{HIDDEN}_E64_beside_E8_K{TOP_K}/{way}",
        _setup_of_both(backward),
        _cost(TOKENS, 64, backward),
        repeats=5,
        quick=False,
        tokens=TOKENS,
    )


CASES = [
    *(_case(TOKENS, experts, backward) for backward in (False, True) for experts in (8, 64)),
    *(_case(FEW_TOKENS, experts, False) for experts in (8, 64)),
    *(_case_of_both(backward) for backward in (False, True)),
]
