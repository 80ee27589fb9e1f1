"""Loss and gradient against TRL 1.16's `GRPOTrainer._compute_loss`: the same log-probs in float64, the same weights and tokens in float32.

TRL's loss type is a normaliser here, its importance sampling level a ratio, its top-entropy quantile a weight, its beta a penalty:

    loss_type   grpo -> per_sequence, bnpo and dapo -> token_mean, dr_grpo -> constant_length, luspo -> token_sum,
                cispo -> token_mean with truncated_weight(1, epsilon_high - 1): TRL's epsilon_high is the cap itself, not a distance from 1
    level       token -> token_ratio, sequence -> mean_ratio (below)
    use_bias_correction_kl   False -> kl_penalty, True (TRL's default) -> corrected_kl

TRL refuses none of these combinations (it warns of a sequence level with a loss type that sums over tokens).

What differs by design, each with a test that says how:

* **A reply's ratio.** TRL takes the geometric mean of the token ratios as *one* number, whose gradient goes to all tokens of the reply.
  GSPO's own token form, `sequence_ratio`, has the same value, but the gradient of a token's loss goes through this token's log-prob (the
  paper, section 4.3). Where the tokens of a reply count alike, the gradients are the same, too. They differ with top-entropy weights, with
  a penalty times the ratio and with an advantage per token: a token that its weight silences is pushed like its neighbours in TRL, and
  stays silent here.
* **Micro-batches.** Our normalisers and quantiles read the whole minibatch, so cutting it up changes no number. TRL's `bnpo` is then a mean
  of means, and its entropy threshold that of each piece. Its other loss types agree with ours.
* **Several updates per rollout.** TRL's `dapo` and `cispo` divide by the *average* number of tokens of an update, ours by the update's own.
* **Ties in double precision.** TRL compares float64 entropies with a threshold rounded to float32, so tokens that tie with it may all be
  silenced; we compare both in float32 and keep them.
* **clip_ratio of a sequence level.** TRL counts replies, we count tokens. At token level the metrics are the same.
"""
from functools import cache
from itertools import product

import pytest
import torch

from rlworkbench.core.item import Item
from rlworkbench.core.reductions import masked_mean
from rlworkbench.core.step import Step, take
from rlworkbench.policies.families import family
from rlworkbench.recipes.cispo import truncated_weight
from rlworkbench.recipes.dr_grpo import constant_length
from rlworkbench.recipes.entropy20 import top_entropy
from rlworkbench.recipes.grpo import grpo
from rlworkbench.recipes.gspo import sequence_ratio
from rlworkbench.recipes.slots import clipped, corrected_kl, kl_penalty, none, ones, per_sequence, token_mean, token_ratio, token_sum
from rlworkbench.rollouts.sampler import sample
from rlworkbench.rollouts.sampling import Sampling
from rlworkbench.rollouts.scorer import score
from rlworkbench.training.health import update_health
from rlworkbench.training.loss import policy_loss, prepare
from tests.conftest import sharpen

LOW, HIGH, CAP, SHARE, LONGEST, DRIFT = .2, .28, 1.5, .3, 9, .3
LENGTHS = (7, 3, 5, 1, 6, 0, 4, 2)                                 # the sixth was cut off and masked as a whole
ADVANTAGES = (1., .7, -1.3, -.8, .5, -.4, 0., .9)
SHIFTS = (.5, -.5, .6, -.7, .05, .1, .3, -.02)                     # how far the replies' ratios are from 1, in nats


def mean_ratio(step):
    "TRL's sequence level: the geometric mean of the token ratios, its gradient spread over all tokens of the reply."
    return masked_mean(step.logp - step.old, step.mask, 1).exp()[:, None].expand_as(step.logp)


NORMALISE = {"grpo": per_sequence, "dr_grpo": constant_length, "luspo": token_sum, **dict.fromkeys(("dapo", "bnpo", "cispo"), token_mean)}
LEVEL = {"token": token_ratio, "sequence": mean_ratio}
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
every_loss = pytest.mark.parametrize("loss", LOSSES)
GRID = [*product(LOSSES, LEVEL, (0., .04), (1., SHARE)), *product(("luspo",), ("sequence",), (0., .04), (1., SHARE))]
grid = pytest.mark.parametrize("loss, level, beta, top", GRID, ids=lambda x: str(x))


def recipe_of(loss, level="token", beta=0., top=1., corrected=False):
    "The slots that say what a TRL configuration says."
    penalty = none if beta == 0 else corrected_kl(beta) if corrected else kl_penalty(beta)
    surrogate = truncated_weight(1., CAP - 1) if loss == "cispo" else clipped(LOW, HIGH)
    return grpo.but(name=f"trl_{loss}", weight=ones if top == 1 else top_entropy(top), ratio=LEVEL[level], surrogate=surrogate,
                    penalty=penalty, normalise=NORMALISE[loss])


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    "A function that builds a GRPOTrainer from a small Qwen3 on disk. TRL is imported here, so that other tests need not wait for it."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    policy, home = sharpen(family("qwen3")), tmp_path_factory.mktemp("trl")
    policy.model.save_pretrained(home / "qwen3")
    data = Dataset.from_list([{"prompt": "What is 7+5?"}])

    def build(loss, level="token", beta=0., top=1., corrected=False, size=8, accumulate=1, per_rollout=None, **more):
        settings = GRPOConfig(
            output_dir=str(home), use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False, disable_tqdm=True,
            per_device_train_batch_size=size, num_generations=4, max_completion_length=LONGEST, gradient_accumulation_steps=accumulate,
            steps_per_generation=per_rollout, loss_type=loss, importance_sampling_level=level, beta=beta, top_entropy_quantile=top,
            use_bias_correction_kl=corrected, epsilon=LOW, epsilon_high=CAP if loss == "cispo" else HIGH, **more)
        trainer = GRPOTrainer(model=str(home / "qwen3"), reward_funcs=lambda completions, **_: [0.] * len(completions), args=settings,
                              processing_class=policy.tokenizer, train_dataset=data)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = accumulate      # set by the training loop otherwise
        return trainer
    build.policy = policy
    return build


def leaf(x):
    return x.detach().clone().requires_grad_()


def batch_of(dtype=torch.float64) -> Step:
    "Two groups of four: ragged, a reply without a token, two tokens of a tool, ratios beyond every clip, noise behind the ends."
    stream = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(len(LENGTHS), max(LENGTHS), dtype=torch.float64, generator=stream)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()
    mask[0, 2] = mask[4, 3] = 0
    old = -.05 - 2 * draw().sigmoid()
    columns = dict(mask=mask, old=old, ref=old + .3 * draw(), logp=old + torch.tensor(SHIFTS)[:, None] + .2 * draw(),
                   entropy=draw().abs().float(), advantage=torch.tensor(ADVANTAGES, dtype=torch.float64))    # float32 holds the entropies
    return Step(group=torch.arange(2).repeat_interleave(4), length=torch.tensor(LENGTHS), law=Sampling(max_tokens=LONGEST),
                **{k: v.to(dtype) for k, v in columns.items()})


def trl_inputs(batch, **more):
    "What TRL's rollout phase hands to the loss. The log-probs come from the patch, so the ids say nothing but their shape."
    ids = torch.ones(batch.mask.shape, dtype=torch.long)
    written = (torch.arange(ids.shape[1]) < batch.length[:, None]).long()
    return {"prompt_ids": ids[:, :3], "prompt_mask": ids[:, :3], "completion_ids": ids, "completion_mask": written,
            "tool_mask": batch.mask.long(), "advantages": batch.advantage,
            "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref,
            "num_items_in_batch": batch.mask.sum().long(), **more}


def theirs(trainer, batch, **more):
    "TRL's loss of these log-probs, and its gradient with respect to each of them."
    logp = leaf(batch.logp)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, batch.entropy, None)
    loss = trainer._compute_loss(trainer.model, trl_inputs(batch, **more))
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def ours(recipe, batch, micro=None):
    "The recipe's loss of the same log-probs, and its gradient."
    logp = leaf(batch.logp)
    batch = take(batch, torch.arange(len(batch)))
    batch.logp = logp
    prepare(recipe, batch)
    loss = sum(policy_loss(recipe, take(batch, rows)) for rows in torch.arange(len(batch)).split(micro or len(batch)))
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def apart(a, b) -> float:
    "The largest deviation of loss and gradient."
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def test_the_batch_is_worth_comparing():
    """Every corner of the clip, the cap, the threshold, at both levels; otherwise agreement would mean little."""
    batch = batch_of()
    counts = batch.mask > 0
    A = batch.advantage[:, None].expand_as(batch.mask)
    for level in LEVEL.values():
        r = level(batch)
        for sign in (A > 0, A < 0):
            assert all((counts & sign & there).any() for there in (r < 1 - LOW, r > 1 + HIGH))
        assert (counts & (r > 1 - LOW) & (r < 1 + HIGH)).any() and (counts & (r > CAP)).any() and (counts & (r < CAP)).any()
    kept = top_entropy(SHARE)(batch).bool()
    assert 3 < kept[counts].sum() < counts.sum() / 2
    assert (batch.mask.sum(1) == 0).any() and (batch.ref - batch.logp).abs().min() > 1e-3


@grid
def test_same_log_probs_same_loss_and_gradient(stock, loss, level, beta, top):
    batch = batch_of()
    mine, other = ours(recipe_of(loss, level, beta, top), batch), theirs(stock(loss, level, beta, top), batch)
    assert apart(mine, other) < 1e-10
    assert mine[1].abs().max() > 1e-3 and (mine[1][batch.mask == 0] == 0).all()


@pytest.mark.parametrize("loss, level, top", [*product(LOSSES, LEVEL, (1., SHARE)), ("luspo", "sequence", 1.)])
def test_bias_corrected_divergence(stock, loss, level, top):
    """TRL's default; against our penalty times the ratio. Without the correction the numbers are others."""
    batch, trainer = batch_of(), stock(loss, level, .04, top, corrected=True)
    assert apart(ours(recipe_of(loss, level, .04, top, corrected=True), batch), theirs(trainer, batch)) < 1e-10
    assert apart(ours(recipe_of(loss, level, .04, top), batch), theirs(trainer, batch)) > 1e-4


@every_loss
@pytest.mark.parametrize("level", LEVEL)
def test_on_policy(stock, loss, level):
    """Without old log-probs TRL takes the present ones, and on-policy so do we."""
    batch = batch_of()
    batch.old = batch.logp.clone()
    assert apart(ours(recipe_of(loss, level, .04), batch), theirs(stock(loss, level, .04), batch, old_per_token_logps=None)) < 1e-10


@every_loss
@pytest.mark.parametrize("level", LEVEL)
def test_an_advantage_for_each_token(stock, loss, level):
    batch = batch_of()
    batch.advantage = torch.randn(batch.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert apart(ours(recipe_of(loss, level), batch), theirs(stock(loss, level), batch)) < 1e-10


@pytest.mark.parametrize("loss", [x for x in LOSSES if x != "cispo"])
def test_metrics_of_one_name_are_one_number(stock, loss):
    batch, trainer = batch_of(), stock(loss, beta=.04)
    theirs(trainer, batch)
    told = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    prepare(recipe_of(loss, beta=.04), batch)
    metrics = update_health(batch) | {"entropy": float(masked_mean(batch.entropy, batch.mask))}
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert told[name] > 0 and metrics[name] == pytest.approx(told[name], abs=1e-6), name


# --- what differs by design ---
def test_the_cap_of_cispo_is_absolute_in_trl(stock):
    """epsilon_high = 0.28 scales down every gradient in TRL; read as a distance from 1 it would cap the weight at 1.28."""
    batch, trainer = batch_of(), stock("cispo")
    trainer.epsilon_high = HIGH
    absolute = recipe_of("cispo").but(surrogate=truncated_weight(1., HIGH - 1))
    assert apart(ours(absolute, batch), theirs(trainer, batch)) < 1e-10
    assert apart(ours(recipe_of("cispo").but(surrogate=truncated_weight(1., HIGH)), batch), theirs(trainer, batch)) > .01


@pytest.mark.parametrize("loss, beta, top", product(LOSSES, (0., .04), (1., SHARE)))
def test_the_token_form_of_a_reply_s_ratio(stock, loss, beta, top):
    """`sequence_ratio`: always TRL's value and the same sum over a reply; TRL's gradient wherever the tokens of a reply count alike."""
    batch, settings = batch_of(), (loss, "sequence", beta, top)
    mine, other = ours(recipe_of(*settings).but(ratio=sequence_ratio), batch), theirs(stock(*settings), batch)
    assert abs(mine[0] - other[0]) < 1e-10
    assert (mine[1].sum(1) - other[1].sum(1)).abs().max() < 1e-10
    if top == 1 or loss == "cispo":
        assert apart(mine, other) < 1e-10
    else:
        assert apart(mine, other) > 1e-4
    if top < 1 and beta == 0:
        silent = (batch.mask > 0) & (top_entropy(top)(batch) == 0)
        assert (mine[1][silent] == 0).all() and (other[1][silent] == 0).all() == (loss == "cispo")


@pytest.mark.parametrize("reason", ["weights", "corrected divergence", "advantages"])
def test_three_reasons_why_tokens_of_a_reply_count_differently(stock, reason):
    """The token form and TRL's one number: same value, same sum over a reply, another gradient for a token."""
    batch, settings = batch_of(), ("grpo", "sequence", .04, SHARE if reason == "weights" else 1., reason == "corrected divergence")
    if reason == "advantages":
        batch.advantage = batch.advantage[:, None] * torch.linspace(.5, 2, 7, dtype=torch.float64)
    mine, other = ours(recipe_of(*settings).but(ratio=sequence_ratio), batch), theirs(stock(*settings), batch)
    assert abs(mine[0] - other[0]) < 1e-10 and (mine[1].sum(1) - other[1].sum(1)).abs().max() < 1e-10
    assert (mine[1] - other[1]).abs().max() > 1e-4


HALVES = torch.arange(8).split(4)


def accumulated(trainer, batch):
    "TRL's loss and gradient, added up over two pieces of a minibatch."
    parts = [theirs(trainer, take(batch, rows), num_items_in_batch=batch.mask.sum().long()) for rows in HALVES]
    return sum(p[0] for p in parts), torch.cat([p[1] for p in parts])


@pytest.mark.parametrize("loss", (*LOSSES, "luspo"))
def test_micro_batches(stock, loss):
    """A minibatch in two pieces: our numbers stay, and so do TRL's, except that its bnpo becomes a mean of means."""
    level, batch = "sequence" if loss == "luspo" else "token", batch_of()
    recipe = recipe_of(loss, level, .04)
    parts = accumulated(stock(loss, level, .04, size=4, accumulate=2), batch)
    whole = ours(recipe, batch)
    assert apart(whole, ours(recipe, batch, micro=4)) < 1e-12
    if loss == "bnpo":
        assert apart(whole, parts) > 1e-4
        means = [ours(recipe, take(batch, rows)) for rows in HALVES]
        whole = sum(m[0] for m in means) / 2, torch.cat([m[1] for m in means]) / 2
    assert apart(whole, parts) < 1e-10


def test_the_entropy_threshold_of_micro_batches(stock):
    """Ours is the minibatch's, TRL's that of each piece."""
    batch, parts = batch_of(), accumulated(stock("dapo", top=SHARE, size=4, accumulate=2), batch_of())
    assert apart(ours(recipe_of("dapo", top=SHARE), batch, micro=4), parts) > 1e-4
    piecewise = recipe_of("dapo").but(weight=lambda step: torch.cat([top_entropy(SHARE)(take(step, rows)) for rows in HALVES]))
    assert apart(ours(piecewise, batch), parts) < 1e-10


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_several_updates_per_rollout(stock, loss):
    """Both divide by tokens: TRL by half of all, ours by those of the update."""
    batch, trainer = batch_of(), stock(loss, size=4, accumulate=1, per_rollout=2)
    everything = batch.mask.sum()
    for rows in HALVES:
        half = take(batch, rows)
        mine, other = ours(recipe_of(loss), half), theirs(trainer, half, num_items_in_batch=everything.long())
        assert apart(mine, other) > 1e-4
        assert apart([x * half.mask.sum() for x in mine], [x * everything / 2 for x in other]) < 1e-10


def test_ties_in_double_precision(stock):
    """All entropies are a third, which float32 rounds up: TRL silences every token in float64 and none in float32, ours none in either."""
    for dtype in (torch.float64, torch.float32):
        batch = batch_of(dtype)
        batch.entropy = torch.full_like(batch.entropy, 1 / 3)
        mine, other = ours(recipe_of("dapo", top=SHARE), batch), theirs(stock("dapo", top=SHARE), batch)
        assert torch.equal(mine[1], ours(recipe_of("dapo"), batch)[1])
        assert apart(mine, other) < 1e-6 if dtype == torch.float32 else (other[1] == 0).all()


def test_clipped_replies_and_clipped_tokens(stock):
    batch, trainer = batch_of(), stock("grpo", "sequence")
    theirs(trainer, batch)
    prepare(recipe_of("grpo", "sequence"), batch)
    for side, name in ((-1, "clip_ratio/low_mean"), (1, "clip_ratio/high_mean")):
        told, mine, out = trainer._metrics["train"][name][-1], update_health(batch)[name], batch.clipped == side
        assert told == pytest.approx(out.any(1).double().mean().item(), abs=1e-6)
        assert mine == pytest.approx((out.sum() / batch.mask.sum()).item(), abs=1e-6)
        assert abs(mine - told) > 1e-3


# --- end to end, float32: TRL's own log-probs of the same weights and tokens ---
ITEMS = [Item("long", "What is the sum of 7+5 and 3+4?"), Item("short", "7+5")]


@pytest.fixture(scope="session")
def rollouts(stock):
    "For a temperature: replies of the policy on disk, which is the reference too, and a policy that has moved since."
    def draw(temperature):
        law = Sampling(temperature, max_tokens=LONGEST)
        step = Step(items=ITEMS, group=torch.arange(2).repeat_interleave(4), prompts=stock.policy.encode(ITEMS), law=law,
                    generator=torch.Generator().manual_seed(1), advantage=torch.tensor(ADVANTAGES))
        given = torch.full((8, LONGEST), -1)
        given[torch.arange(8), torch.tensor(LENGTHS) - 1] = stock.policy.eos       # the sixth ends where all end
        sample(stock.policy, step, law, given)
        with torch.no_grad():
            step.ref = score(stock.policy, step, law)["logp"]
        now, stream = stock.policy.copy(), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in now.weights().values():
                p += DRIFT * p.std() * torch.randn(p.shape, generator=stream) if p.dim() > 1 else 0
                p.requires_grad_()
        return now, step
    return cache(draw)


def padded(step) -> dict:
    "The same tokens as TRL pads them: prompts on the left, replies on the right."
    rows = [step.prompts.ids[g] for g in step.group.tolist()]
    width = max(map(len, rows))
    left = lambda make: torch.stack([torch.nn.functional.pad(make(r), (width - len(r), 0)) for r in rows])
    return {"prompt_ids": left(lambda r: r), "prompt_mask": left(torch.ones_like), "completion_ids": step.ids.clamp(min=0),
            "completion_mask": step.mask.long(), "advantages": step.advantage, "old_per_token_logps": step.old,
            "num_items_in_batch": step.mask.sum().long()}


def by_trl(trainer, now, step):
    "TRL's loss through its own forward, and the gradient of each weight."
    trainer.model.load_state_dict(now.model.state_dict())
    inputs = padded(step)
    if trainer.ref_model is not None:
        both = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        with torch.no_grad():
            inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(trainer.ref_model, *both, step.ids.shape[1])[0]
        assert (inputs["ref_per_token_logps"] - step.ref).abs().max() < 1e-5
    loss = trainer._compute_loss(trainer.model, inputs)
    weights = dict(trainer.model.named_parameters())
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


def by_us(recipe, now, step):
    "The recipe's loss through the scorer, and the gradient of each weight; the batch as it was."
    batch = take(step, torch.arange(len(step)))
    recipe.forward(now, batch)
    prepare(recipe, batch)
    loss, weights = policy_loss(recipe, batch), now.parameters()
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())))), batch


def relative(mine: dict, other: dict) -> float:
    "How far two gradients are from each other, against the norm of all."
    assert set(mine) == set(other)
    norm = lambda grads: sum(g.double().square().sum() for g in grads).sqrt()
    return float(norm([mine[n] - other[n] for n in mine]) / norm(other.values()))


def end_to_end(stock, rollouts, configuration, temperature=1., corrected=False):
    "Largest deviation of the loss, and of the gradient relative to its norm."
    now, step = rollouts(temperature)
    loss, grads, batch = by_us(recipe_of(*configuration, corrected), now, step)
    known, slopes = by_trl(stock(*configuration, corrected, temperature=temperature), now, step)
    return abs(loss - known), relative(grads, slopes), batch


@pytest.mark.parametrize("loss, level, beta, top", [g for g in GRID if g[0] != "luspo"], ids=lambda x: str(x))
def test_end_to_end(stock, rollouts, loss, level, beta, top):
    value, slope, batch = end_to_end(stock, rollouts, (loss, level, beta, top))
    assert value < 1e-5 and slope < 1e-5
    assert batch.length.unique().numel() > 2 and len({len(r) for r in batch.prompts.ids}) == 2
    if loss != "cispo" and level == "token":
        assert (batch.clipped > 0).any() and (batch.clipped < 0).any()
    assert (batch.weight[batch.mask > 0] == 0).any() == (top < 1)


@every_loss
@pytest.mark.parametrize("temperature", [.7, 1.5])
def test_end_to_end_at_other_temperatures(stock, rollouts, loss, temperature):
    value, slope, _ = end_to_end(stock, rollouts, (loss, "token", .04, SHARE), temperature, corrected=True)
    assert value < 1e-5 and slope < 1e-5


def test_what_was_sampled_is_what_trl_scores(stock, rollouts):
    """Our sampler's log-probs, TRL's of the same policy, token by token, at three temperatures."""
    for temperature in (.7, 1., 1.5):
        _, step = rollouts(temperature)
        inputs, trainer = padded(step), stock("grpo", temperature=temperature)
        both = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        with torch.no_grad():
            logp, entropy, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *both, step.ids.shape[1], compute_entropy=True)
        counts = step.mask > 0
        assert (logp - step.old)[counts].abs().max() < 1e-5 and (entropy - step.entropy)[counts].abs().max() < 1e-5
