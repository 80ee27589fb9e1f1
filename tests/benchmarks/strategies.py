"""Strategies: what asking in batches saves, and what a strategy costs over drawing the same tokens."""
import statistics
import time

import torch

from rlworkbench.core.step import Step
from rlworkbench.policies.tiny import load_tiny
from rlworkbench.reasoning.cautious import cautious
from rlworkbench.reasoning.contrast import contrast, nolan
from rlworkbench.reasoning.drafts import Reader, Reply, chances, decode
from rlworkbench.reasoning.parallel import greedy, sampling, self_consistency
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.tasks.digits import digits_sum

def cpu(ask) -> tuple:
    "CPU seconds, and what came out."
    start = time.process_time()
    out = ask()
    return time.process_time() - start, out


def in_pairs(first, second, repeats=5) -> float:
    "The median of second/first in CPU seconds, run A B B A ..."
    first(), second()
    ratios = []
    for k in range(repeats):
        spent = {f: cpu(f)[0] for f in ((first, second) if k % 2 == 0 else (second, first))}
        ratios.append(spent[second] / spent[first])
    return statistics.median(ratios)


def strategies(questions=8, n=16, tokens=34) -> dict:
    "Sixteen replies together and one by one; a vote and a contrast against plain decoding of the same tokens; cautious per token."
    policy, items = load_tiny(), digits_sum.items("test")[:questions]
    few = items[:2]

    def one_by_one():
        for item in few:
            for k in range(n):
                with torch.no_grad():
                    drafts = decode([Reader(policy, [item])], [0], [tokens], chances(0, [item.id], [k], tokens), law=Sampling(.7))
                Reply().add(drafts, 0).trace(policy, item)

    def raw(group):
        step = Step(items=items, group=torch.arange(questions).repeat_interleave(group), prompts=policy.encode(items))
        sample(policy, step, Sampling(0.0, tokens))
        return step
    voted = self_consistency.but(n=n, temperature=0.0)
    same = [t.ids for t in voted(policy, items, n * tokens)] == [row[:int(k)].tolist() for row, k in zip(raw(1).ids, raw(1).length)]
    together = self_consistency.but(n=n)

    def per_token(strategy):
        spent, traces = cpu(lambda: strategy(policy, items, 4 * tokens))
        return spent / sum(t.spent for t in traces)
    careful = statistics.median(per_token(cautious) / per_token(sampling) for _ in range(5))
    return {"one_by_one_over_together": in_pairs(lambda: together(policy, few, n * tokens), one_by_one, 3), "vote_over_raw": in_pairs(lambda: raw(n), lambda: voted(policy, items, n * tokens)),
            "greedy_over_raw": in_pairs(lambda: raw(1), lambda: greedy(policy, items, tokens)), "same_tokens": same,
            "contrast_over_greedy": in_pairs(lambda: greedy(policy, items, tokens), lambda: contrast.but(alpha=0.0)(policy, items, 2 * tokens)),
            "nolan_over_greedy": in_pairs(lambda: greedy(policy, items, tokens), lambda: nolan.but(beta=0.0)(policy, items, 2 * tokens)),
            "cautious_per_token_over_sampling": careful}
