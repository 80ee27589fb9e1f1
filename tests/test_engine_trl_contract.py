"""What GRPOTrainer promises, asked of TRL's own trainer and of RecipeTrainer alike. With no recipe of its own, RecipeTrainer runs what TRL's settings say."""
import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import pytest
import torch
from PIL import Image

from rlworkbench.policies.families import family
from rlworkbench.recipes.dr_grpo import dr_grpo
from tests.conftest import sharpen
from tests.trl_side import CPU

P, G, LONGEST = 2, 4, 6
ASKED = ["What is 7+5?", "Which is larger, 3 or 4?"]
SAID = [[5, 9, 11], [7, 8], [5, 9, 11, 30, 31, 32], [40], [5, 6, 7], [9, 9, 9, 9], [21, 22, 23, 24, 25, 26], [3, 14]]   # without their end tokens


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    "A small text model and a small one that sees, on disk, each with what reads for it."
    out = {}
    for name in ("qwen3", "llava"):
        policy, folder = sharpen(family(name)), tmp_path_factory.mktemp("model") / name
        policy.model.save_pretrained(folder)
        out[name] = str(folder), policy.processor
    return out


def by_length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def by_first(completion_ids, **_):
    return [float(ids[0] % 5) for ids in completion_ids]


@pytest.fixture(params=["stock", "ours"])
def build(request, home, tmp_path):
    "A function that builds the trainer in question."
    return lambda **said: made(request.param, home, tmp_path, **said)


def made(kind, home, folder, reward=by_first, model="qwen3", data=None, peft=None, more=None, **said):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rlworkbench.engines.trl import recipe_trainer
    args = GRPOConfig(str(folder), **CPU | dict(per_device_train_batch_size=P * G, num_generations=G, max_completion_length=LONGEST, max_steps=1, seed=0, learning_rate=.02,
                                               weight_decay=0.0, max_grad_norm=0.0, optim="sgd", loss_type="grpo") | said)
    where, processor = home[model]
    data = data or [{"prompt": [{"role": "user", "content": q}], "answer": str(k)} for k, q in enumerate(ASKED)]
    cls = GRPOTrainer if kind == "stock" else recipe_trainer()
    trainer = cls(model=where, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(data), processing_class=processor, peft_config=peft, **more or {})
    trainer.grads = []
    trainer.add_callback(keeper(trainer))
    return trainer


def keeper(trainer):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        "Keeps the gradient of each update."
        def on_pre_optimizer_step(self, *args, **named):
            trainer.grads.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    return Keep()


def dictate(trainer, said=SAID):
    "The same replies in every rollout; all but those as long as allowed end with the end token."
    end = trainer.eos_token_ids[0]
    trainer._generate_single_turn = lambda *args, **named: ([r if len(r) == LONGEST else r + [end] for r in said], None)
    return trainer


def logged(trainer):
    return trainer.state.log_history[0]


def apart(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).detach().abs().max()) for n in a) / max(float(v.detach().abs().max()) for v in b.values())


# --- one at a time ---
def test_a_step_moves_the_weights_and_logs_what_it_should(build):
    trainer = build()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert {"loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens", "step_time", "completions/mean_length",
            "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean", "rewards/by_first/mean"} <= set(logged(trainer))


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_reply_without_a_reward_stays_out_of_its_group_s_baseline(build, nothing):
    trainer = dictate(build(reward=lambda completion_ids, **_: [1., 0., nothing, 1., 1., nothing, nothing, nothing]))
    trainer.train()
    A = list(trainer._logs["advantages"])
    zscore = lambda x: ((x - x.mean()) / (x.std() + 1e-4)).tolist()
    assert A[:2] + [A[3]] == pytest.approx(zscore(torch.tensor([1., 0., 1.])), abs=1e-5)
    assert (A[2], A[5:]) == (0.0, [0.0] * 3) and logged(trainer)["reward"] == pytest.approx(.75)


def test_several_reward_functions_with_weights(build):
    trainer = dictate(build(reward=[by_length, by_first], reward_weights=[.5, 2.]))
    trainer.train()
    ids = [r + [0] * (len(r) < LONGEST) for r in SAID]
    R = .5 * torch.tensor(by_length(ids)) + 2 * torch.tensor(by_first(ids))
    wanted = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in R.view(P, G)])
    assert list(trainer._logs["advantages"]) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert logged(trainer)["rewards/by_first/mean"] == pytest.approx(sum(by_first(ids)) / 8)


def test_one_of_two_functions_says_nothing(build):
    trainer = dictate(build(reward=[by_length, lambda completion_ids, **_: [None] * 4 + [1., 0., 0., 0.]]))
    trainer.train()
    A = torch.tensor(list(trainer._logs["advantages"]))
    assert A.isfinite().all() and logged(trainer)["reward"] == pytest.approx((4 + 3 + 6 + 2 + 4 + 5 + 6 + 3 + 1) / 8)


def test_adapters_learn_and_nothing_else(build):
    from peft import LoraConfig
    trainer = build(peft=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), beta=.1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved) and "kl" in logged(trainer)


def test_the_divergence_is_there_only_with_a_beta(build):
    plain, leashed = dictate(build()), dictate(build(beta=.5, num_iterations=2, max_steps=2, logging_steps=1))
    plain.train()
    leashed.train()
    assert "kl" not in logged(plain) and plain.ref_model is None
    assert logged(leashed)["kl"] == pytest.approx(0, abs=1e-6) and leashed.state.log_history[1]["kl"] > 1e-4
    assert not any(p.requires_grad and p.grad is not None for p in leashed.ref_model.parameters())


def test_replies_that_were_cut_off_teach_nothing_if_so_asked(build):
    whole = dictate(build(mask_truncated_completions=True))
    none = dictate(build(mask_truncated_completions=True, reward=lambda completion_ids, **_: [1., 0.] * 4), [[5, 9, 11, 30, 31, k] for k in range(20, 28)])
    whole.train()
    none.train()
    assert max(float(g.abs().max()) for g in whole.grads[0].values()) > 1e-4
    assert max(float(g.abs().max()) for g in none.grads[0].values()) < 1e-9


def test_checkpoint_and_resume(build):
    """Two steps, and one step, a new trainer and another step: the same weights from the same problems and replies. Where the problems are shuffled, TRL begins a later epoch in the order of the first."""
    whole = dictate(build(max_steps=2, save_strategy="steps", save_steps=1, shuffle_dataset=False, optim="adamw_torch", learning_rate=1e-3))
    whole.train()
    again = dictate(build(max_steps=2, save_strategy="steps", save_steps=1, shuffle_dataset=False, optim="adamw_torch", learning_rate=1e-3))
    again.train(resume_from_checkpoint=os.path.join(whole.args.output_dir, "checkpoint-1"))
    assert again.state.global_step == 2 and len(again.grads) == 1
    assert apart(dict(again.model.named_parameters()), dict(whole.model.named_parameters())) < 1e-6


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_checkpoint_of_a_model_that_sees(kind, home, tmp_path):
    """Its weights have other names on disk. The library's trainer finds none of them and goes on from the weights it has (it says so in a warning); a version that mends this makes `put_back` needless."""
    dots = [{"prompt": [{"role": "user", "content": q}], "images": [Image.new("RGB", (56, 56), c)]} for q, c in zip(ASKED, ("red", "blue"))]
    build = lambda: dictate(made(kind, home, tmp_path, model="llava", data=dots, max_steps=2, save_strategy="steps", save_steps=1, shuffle_dataset=False),
                            [[t + 50 for t in r] for r in SAID])          # 9 is its placeholder
    whole, again = build(), build()
    whole.train()
    again.train(resume_from_checkpoint=os.path.join(whole.args.output_dir, "checkpoint-1"))
    off = apart(dict(again.model.named_parameters()), dict(whole.model.named_parameters()))
    assert off < 1e-6 if kind == "ours" else off > 1e-4


def test_pictures(build):
    dots = [Image.new("RGB", (56, 56), c) for c in ("red", "blue")]
    trainer = build(model="llava", data=[{"prompt": [{"role": "user", "content": q}], "images": [d]} for q, d in zip(ASKED, dots)], gradient_accumulation_steps=2,
                    per_device_train_batch_size=P * G // 2)
    trainer.train()
    seen = [n for n, g in trainer.grads[0].items() if "vision" in n and g.abs().max() > 0]
    assert seen and logged(trainer)["grad_norm"] > 0


def test_it_can_be_evaluated_in_between(build):
    from datasets import Dataset
    held_out = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1?"}]}])
    trainer = build(more={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=G, max_steps=2)
    trainer.train()
    evals = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert len(evals) == 2 and all(torch.isfinite(torch.tensor(row["eval_loss"])) for row in evals)


# --- the two side by side ---
SETTINGS = [dict(loss_type=kind) for kind in ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")] + [
    dict(beta=.3), dict(beta=.3, use_bias_correction_kl=False), dict(scale_rewards="batch"), dict(scale_rewards="none"), dict(importance_sampling_level="sequence", learning_rate=2e-3),
    dict(top_entropy_quantile=.4), dict(mask_truncated_completions=True), dict(epsilon=1e-3, epsilon_high=2e-3), dict(temperature=.7)]


@pytest.mark.parametrize("said", SETTINGS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
def test_the_same_gradients_as_the_stock_trainer(home, tmp_path, said):
    """Two passes over a rollout, the second off-policy; in two pieces where TRL's number does not depend on it."""
    pieces = 1 if said.get("loss_type") == "bnpo" or "top_entropy_quantile" in said else 2
    both = [dictate(made(kind, home, tmp_path, reward=by_first, num_iterations=2, max_steps=2, gradient_accumulation_steps=pieces,
                         per_device_train_batch_size=P * G // pieces, **said)) for kind in ("stock", "ours")]
    for trainer in both:
        trainer.train()
    stock, ours = both
    assert list(ours._logs["advantages"]) == pytest.approx(list(stock._logs["advantages"]), abs=1e-6)
    for a, b in zip(ours.grads, stock.grads, strict=True):
        assert apart(a, b) < 1e-5
    assert [row["loss"] for row in ours.state.log_history[:2]] == pytest.approx([row["loss"] for row in stock.state.log_history[:2]], abs=1e-6, rel=1e-5)
    assert apart(ours.grads[0], ours.grads[1]) > 1e-4                      # the second update is another one


def test_the_advantages_in_the_log_are_those_that_are_trained(home, tmp_path):
    """TRL logs its own before a subclass can say otherwise; of dr_grpo they would be divided by the spread."""
    trainer = dictate(made("ours", home, tmp_path, reward=by_first, loss_type="dapo", more={"recipe": dr_grpo}))
    trainer.train()
    R = torch.tensor(by_first(SAID)).view(P, G)
    wanted = (R - R.mean(1, keepdim=True)).flatten().tolist()
    assert list(trainer._logs["advantages"]) == pytest.approx(wanted, abs=1e-6) == trainer.kept.advantage.tolist()


@pytest.mark.parametrize("said, says", [
    (dict(beta=.1), "beta=0.1 is said twice"), (dict(num_iterations=2), "has 1 minibatches and 1 passes"), (dict(steps_per_generation=3, gradient_accumulation_steps=2), "must be a multiple of")])
def test_settings_that_contradict_the_recipe(home, tmp_path, said, says):
    with pytest.raises(ValueError, match=says):
        made("ours", home, tmp_path, **{"loss_type": "dapo", "per_device_train_batch_size": P * G} | said, more={"recipe": dr_grpo})


def test_settings_without_a_slot(home, tmp_path):
    with pytest.raises(ValueError, match="delta=2.0 has no slot here"):
        made("ours", home, tmp_path, delta=2.0)
