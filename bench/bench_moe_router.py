"""The router: top-2 of E experts under a capacity, gates, places and both losses, against the eager formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.case import ON_GPU, Callables, Case, Cost, Target

TOKENS, TOP_K = 4096, 2
GPU_TOKENS = 32768


def eager_router(logits: Any, capacity: int) -> tuple[Any, Any]:
    """The same in torch as peers write it: one-hot masks and their running sums. Gates, loss."""
    import torch

    experts = logits.shape[1]
    probabilities = torch.softmax(logits.float(), dim=-1)
    gates, chosen = probabilities.topk(TOP_K, dim=-1)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    mask = torch.nn.functional.one_hot(chosen, experts)  # (N, K, E)
    by_choice = mask.transpose(0, 1).reshape(-1, experts)
    places = (by_choice.cumsum(dim=0) - 1).view(TOP_K, -1, experts).transpose(0, 1)
    kept = (places * mask).sum(dim=-1) < capacity
    share = mask[:, 0].float().mean(dim=0)
    balance = experts * (share * probabilities.mean(dim=0)).sum()
    z = torch.logsumexp(logits.float(), dim=-1).square().mean()
    return gates * kept, 1e-2 * balance + 1e-3 * z


def _setup(tokens: int, experts: int, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops import expert_capacity, moe_router

        logits = target.randn(tokens, experts, grad=backward)
        grad = torch.randn(tokens, TOP_K, device=target.device)
        capacity = expert_capacity(tokens, experts, factor=1.25, convention="per_assignment")

        def ours(logits: Any) -> tuple[Any, Any]:
            routing = moe_router(logits, top_k=TOP_K, capacity=capacity)
            return routing.gates, 1e-2 * routing.balance_loss + 1e-3 * routing.z_loss

        compiled = torch.compile(eager_router)

        def call(router: Callable[..., tuple[Any, Any]]) -> Callable[[], object]:
            def forward() -> object:
                return router(logits)

            def both() -> object:
                gates, loss = router(logits)
                return torch.autograd.grad(
                    [gates, loss], logits, [grad, torch.ones((), device=target.device)]
                )

            return both if backward else forward

        return {
            "gptcore": call(ours),
            "torch_eager": call(lambda x: eager_router(x, capacity)),
            "torch_compiled": call(lambda x: compiled(x, capacity)),
        }

    return setup


def _cost(tokens: int, experts: int, *, backward: bool) -> Callable[[int], Cost]:
    """Logits read (and their gradient written); three tables of choices written."""

    def cost(element: int) -> Cost:
        logits, tables = tokens * experts * element, 3 * 4 * tokens * TOP_K
        return Cost(0, logits * (2 if backward else 1), tables + (logits if backward else 0))

    return cost


CASES = [
    Case(
        f"moe_router/N{tokens}_E{experts}_K{TOP_K}/{'forward_backward' if backward else 'forward'}",
        _setup(tokens, experts, backward=backward),
        _cost(tokens, experts, backward=backward),
        dtypes=("float32",),  # bf16 logits tie, and peers break ties as they come
        quick=backward and experts == 8,
        devices=("cpu",) if tokens == TOKENS else ON_GPU,
    )
    for tokens in (TOKENS, GPU_TOKENS)
    for experts in (8, 64, 256)
    for backward in (False, True)
]
