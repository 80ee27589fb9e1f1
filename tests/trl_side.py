"""One rollout through both: the workbench's own slots, and the same slots inside TRL's trainer. `python -m tests.trl_side` writes the parity table."""
import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch

from rlworkbench.core.registry import recipes, tasks
from rlworkbench.core.seeds import generator
from rlworkbench.core.step import Step, put, take
from rlworkbench.engines.fit import refusals
from rlworkbench.recipes.dapo import mixed_groups
from rlworkbench.recipes.recipe import Recipe
from rlworkbench.recipes.slots import shuffled
from rlworkbench.rollouts.parts import task_score
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.training.choices import load_policy
from rlworkbench.training.collect import one_round, rewarded
from rlworkbench.training.loss import checked, losses, minibatches, prepare
from rlworkbench.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "nbs/engines/results/parity.json"
P, G, PIECES = 4, 4, 2
MOVE = .1      # of each weight, between two passes over the same replies
CPU = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, lr_scheduler_type="constant")


def runnable(task) -> dict:
    "Every registered recipe that TRL can run, with a reason where it is not quite the registered one."
    out = {}
    for name, r in recipes.all().items():
        if isinstance(r, Recipe) and getattr(r.keep, "refill", 0):
            out[name] = r.but(keep=mixed_groups(0)), "no refill"
        elif isinstance(r, Recipe) and not refusals(r, task=task):
            out[name] = r.but(order=shuffled), "" if r.order is shuffled else "the same problems in plain order"
    return out


def with_law(recipe, task):
    return recipe.but(rollout=replace(recipe.rollout, sampling=Sampling(max_tokens=task.max_tokens)))


def unbanned(policy: str):
    "TRL's law: a token that is not sampled keeps its share of the softmax."
    policy = load_policy(policy)
    policy.banned = ()
    return policy


def rollout(policy, task, recipe, seed=0):
    "A Step of the workbench's own, up to the advantage."
    trainer = Trainer(policy, task, with_law(recipe, task), P, G, seed=seed, steps=1, drift=0, watchers=())
    for step in one_round(trainer, 0, []):
        pass
    return step


def mixed(policy, task, step):
    "The same rollout with something right and something wrong in each group, and a mistake longer than what is right."
    texts = list(step.text)
    for g, item in enumerate(step.items):
        rows = (step.group == g).nonzero()[:, 0].tolist()
        right = [task.score(item, texts[i])["correct"] > 0 for i in rows]
        if not any(right):
            texts[rows[0]] = task.gold(item)
        elif len(texts[rows[0]]) <= min(len(texts[i]) for i, r in zip(rows, right) if r):
            answer = task.answer(texts[rows[-1]])
            texts[rows[-1]] = texts[rows[-1]].replace("<answer>", "<answer>" + "9" * len(answer))     # half of it is right: parts of a reward are rounded to float32 inside TRL, and halves are not
    replies = [policy.tokens(t) for t in texts]
    T = max(map(len, replies))
    ids = torch.tensor([r + [policy.pad] * (T - len(r)) for r in replies])
    length = torch.tensor([len(r) for r in replies])
    made = Step(items=step.items, group=step.group, reply=step.reply, prompts=step.prompts, law=step.law, ids=ids, length=length, text=texts, seed=step.seed, clock=step.clock,
                mask=(torch.arange(T) < length[:, None]).to(step.mask.dtype), truncated=torch.zeros_like(step.truncated), size=step.size, rows=step.rows, task=step.task, memory=step.memory)
    with torch.no_grad():
        found = score(policy, made, made.law)
    made.old, made.entropy, made.collision = found["logp"], found["entropy"], found["collision"]
    return made


def settings(tmp, recipe, task, pieces=PIECES, **more):
    from trl import GRPOConfig
    return GRPOConfig(str(tmp), **CPU | dict(per_device_train_batch_size=P * G // recipe.batches // pieces, gradient_accumulation_steps=pieces,
                      steps_per_generation=pieces * recipe.batches, num_iterations=recipe.epochs, num_generations=G, max_completion_length=task.max_tokens,
                      max_steps=recipe.batches * recipe.epochs, seed=0, weight_decay=0.0, max_grad_norm=0.0) | more)


def dictate(trainer, step):
    "TRL's trainer gets these replies in place of its own."
    replies = [row[:n] for row, n in zip(step.ids.tolist(), step.length.tolist())]
    trainer._generate_single_turn = lambda *args, **named: (replies, None)
    return [trainer.train_dataset[i] for i in trainer._get_train_sampler().problems(0) for _ in range(G)]


def build(tmp, policy, task, recipe, **more):
    from rlworkbench.engines.trl import recipe_trainer
    trainer = recipe_trainer()(recipe=with_law(recipe, task), task=task, policy=policy, args=settings(tmp, recipe, task, **more))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.state.max_steps = trainer.args.max_steps
    return trainer


def use(trainer, recipe):
    "The same trainer with another recipe, at its beginning."
    trainer.recipe, args = recipe, trainer.args
    args.steps_per_generation, args.num_iterations = PIECES * recipe.batches, recipe.epochs
    args.per_device_train_batch_size = P * G // recipe.batches // PIECES
    trainer.num_iterations, trainer._step, trainer._buffered_inputs, trainer.state.global_step = recipe.epochs, 0, None, 0


def updates(trainer, rows, wanted):
    "Drive TRL's trainer over one rollout: for each update its minibatch, its loss and the gradient of what is wanted."
    for k in range(trainer.recipe.batches * trainer.recipe.epochs):
        loss, grads = 0.0, None
        for _ in range(PIECES):
            inputs = trainer._prepare_inputs(rows)
            piece = trainer._compute_loss(trainer.model, inputs)
            found = torch.autograd.grad(piece, list(wanted(k).values()), allow_unused=True)
            grads = found if grads is None else [a if b is None else b if a is None else a + b for a, b in zip(grads, found)]
            loss, trainer._step = loss + piece.detach(), trainer._step + 1
        trainer.state.global_step += 1
        yield trainer.batch, loss, dict(zip(wanted(k), grads))


def own(recipe, step, forward):
    "The workbench's own side: minibatch, loss and gradient of each update, weights standing still."
    step.keep = checked(recipe.keep(step), "keep", recipe, step)
    step = take(step, step.keep)
    step.advantage = checked(recipe.advantage(step), "advantage", recipe, step)
    for epoch in range(recipe.epochs):
        for number, rows in enumerate(minibatches(step, recipe.batches, generator(step.seed, "minibatches", step.clock[0], epoch))):
            step.epoch, step.batch = epoch, number
            batch = take(step, rows)
            wanted = forward(batch, epoch * recipe.batches + number, step.rows[rows])
            prepare(recipe, batch)
            loss = sum(losses(recipe, batch).values())
            put(step, batch, "ratio", "weight", "coef")
            yield batch, loss.detach(), dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)))


def apart(a, b) -> float:
    "The largest deviation, in units of the largest number."
    a, b = (torch.zeros(()) if x is None else x.double() for x in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if b.abs().max() > 1e-12 else float((a - b).abs().max())


def compared(mine, theirs) -> dict:
    "The largest deviations over all updates: of the columns in their own unit, of loss and gradient relative to their size."
    out = dict.fromkeys(("advantage", "weight", "coef", "loss", "gradient"), 0.0)
    count = away = 0
    for (a, loss, grads), (b, other, found) in zip(mine, theirs, strict=True):
        for name in ("advantage", "weight", "coef"):
            x, y = getattr(a, name).double(), getattr(b, name).double()
            out[name] = max(out[name], float((x - y).abs().max() if x.dim() == 1 else ((x - y) * a.mask).abs().max()))
        out["loss"] = max(out["loss"], float((loss - other).abs()))
        largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
        off = max(float(((0 if g is None else g) - (0 if found[n] is None else found[n])).abs().max()) for n, g in grads.items() if g is not None or found[n] is not None)
        out["gradient"] = max(out["gradient"], off / largest if largest else off)
        count += largest > 0
        away += bool((((a.logp - a.old).exp() - 1).abs() * a.mask).max() > .2)
    return out | {"updates with a gradient": count, "updates with ratios away from 1": away}


def in_float32(trainer, recipe, step, reference, passes=2) -> dict:
    "Everything end to end: forward passes, log-probs, columns, the gradient of every weight. Between the passes over the rollout the weights move."
    policy, task = trainer.words, trainer.task
    recipe = with_law(recipe, task).but(epochs=passes)
    use(trainer, recipe)
    trainer.beta = 1.0 if "ref" in recipe.needs else 0.0
    rows = dictate(trainer, step)
    step = judged(recipe, replace(step, metrics={}), reference)

    before = {n: w.detach().clone() for n, w in policy.parameters().items()}

    def forward(batch, k, rows):
        if k == recipe.batches:                              # the other side is done with the first pass
            move(policy, before)
        recipe.forward(policy, batch)
        return policy.parameters()
    try:
        return compared(own(recipe, step, forward), updates(trainer, rows, lambda k: policy.parameters()))
    finally:
        move(policy, before, 0)


@torch.no_grad()
def move(policy, weights, size=MOVE):
    "Weights that were, and noise in proportion to each."
    stream = torch.Generator().manual_seed(0)
    for n, w in policy.parameters().items():
        w.copy_(weights[n] * (1 + size * torch.randn(w.shape, generator=stream)))


def judged(recipe, step, reference):
    "Reward and shape by this recipe, reference log-probs if it needs them."
    step.generator = generator(step.seed, "rollout", 0, 0)
    with torch.no_grad():
        step.ref = score(reference, step, step.law)["logp"].to(step.mask.dtype) if "ref" in recipe.needs and step.ref is None else step.ref
    step.rewards = {k: v.to(step.mask.dtype) for k, v in rewarded(recipe, step).items()}
    step.correct = step.rewards.get("correct", task_score(step)["correct"].to(step.mask.dtype))
    step.reward = checked(recipe.shape(step), "shape", recipe, step)
    return step


def noise(step, seed, size):
    return size * torch.randn(step.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * step.mask


def in_float64(trainer, recipe, step) -> dict:
    "The same log-probs on both sides, two passes over the rollout, ratios away from 1 in the second."
    recipe = with_law(recipe, trainer.task).but(epochs=2)
    use(trainer, recipe)
    trainer.beta = 1.0 if "ref" in recipe.needs else 0.0
    rows = dictate(trainer, step)
    wide = replace(step, mask=step.mask.double(), old=step.old.double(), entropy=step.entropy.double(), metrics={})
    wide.ref = wide.old + noise(wide, 1, .3) if "ref" in recipe.needs else None
    said = [wide.old] * recipe.batches + [wide.old + noise(wide, 2, .4)] * recipe.batches
    first = firsts(step)
    said = [x[first] for x in said]
    wide.old, wide.entropy = said[0], wide.entropy[first]
    wide.ref = None if wide.ref is None else wide.ref[first]
    leaves = [x.clone().requires_grad_() for x in said]
    trainer._get_per_token_logps_and_entropies = Dictated(trainer, wide, leaves)
    wide = judged(recipe, wide, None)

    def forward(batch, k, rows):
        leaf = said[k].clone().requires_grad_()
        batch.logp, batch.entropy = leaf[first[rows]], wide.entropy[rows]
        return {"logp": leaf}
    try:
        return compared(own(recipe, wide, forward), updates(trainer, rows, lambda k: {"logp": leaves[k]}))
    finally:
        del trainer._get_per_token_logps_and_entropies


def firsts(step):
    "For each reply the first one to the same problem that says the same."
    seen = {}
    return torch.tensor([seen.setdefault((int(g), *row[:n]), i) for i, (g, row, n) in enumerate(zip(step.group, step.ids.tolist(), step.length.tolist()))])


class Dictated:
    "In place of TRL's forward pass: log-probs that were written beforehand, found again by picture and tokens."

    def __init__(self, trainer, wide, leaves):
        self.trainer, self.wide, self.leaves, self.place = trainer, wide, leaves, {}

    def __call__(self, model, ids, attention, keep, pixel_values=None, **_):
        keys = [(round(float(p.double().sum()), 3), *row[m.bool()].tolist()) for p, row, m in zip(pixel_values, ids, attention)]
        if not self.place:                                   # the first time it is asked about all of them, in order
            self.place = {k: i for i, k in reversed(list(enumerate(keys)))}
        rows, t = [self.place[k] for k in keys], self.trainer
        if t.ref_model is not None and model is t.ref_model:
            return self.wide.ref[rows], None, None
        return self.leaves[min(t.state.global_step, len(self.leaves) - 1)][rows], self.wide.entropy[rows], None


def parity(policy="tiny", task="digits-sum"):
    "For each recipe that TRL can run: the largest deviations from the workbench's own loop."
    task = tasks.get(task)
    policy = unbanned(policy)
    step = mixed(policy, task, rollout(policy, task, recipes.get("grpo")))
    with TemporaryDirectory() as tmp:
        trainer = build(tmp, policy, task, recipes.get("apo_viewr1"))
        reference = policy.copy()
        for name, (recipe, note) in runnable(task).items():
            yield name, {"float64": in_float64(trainer, recipe, step), "float32": in_float32(trainer, recipe, step, reference)} | ({"note": note} if note else {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    table = {}
    for name, found in parity():
        table[name] = found
        print(name, found, flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps({"policy": "tiny", "task": "digits-sum", "prompts": P, "group": G, "pieces": PIECES, "recipes": table}, indent=1) + "\n")
