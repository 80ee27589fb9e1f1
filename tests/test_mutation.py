"""Do the tests notice? Each mutant is the package with one line made wrong; a fast part of the tests must fail on it."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAST = ("test_gradients.py", "test_edges.py", "test_invariance.py")       # those of their tests that need no model and little time
ONLY = "not tiny and not qwen and not demonstrations and not true_gradient and not finite_difference and not plain_k"
SHARE = .95

MUTANTS = (   # file, what stands there (exactly once), what is put in its place
    ("rollouts/sampling.py", "else logits / temperature", "else logits * temperature"),
    ("rollouts/sampling.py", "if not len(banned):", "if True:"),
    ("rollouts/sampling.py", "-(p * logp).sum(-1)", "(p * logp).sum(-1)"),
    ("rollouts/sampling.py", "(p.detach() ** 2).sum(-1)", "(p.detach() ** 2).amax(-1)"),
    ("rollouts/sampling.py", "temperature[at:at + tile] if", "temperature[:tile] if"),
    ("rollouts/sampler.py", "done = done | (token == policy.eos)", "done = done | (token == policy.pad)"),
    ("rollouts/sampler.py", "step.truncated = (last != policy.eos)", "step.truncated = (last == policy.eos)"),
    ("rollouts/scorer.py", "(*policy.banned, *sampling.banned)", "policy.banned"),
    ("rollouts/scorer.py", "sampling.temperature if sampling.score_temperature is None", "1.0 if sampling.score_temperature is None"),
    ("rollouts/parts.py", "if not math.isfinite(number):", "if math.isnan(number):"),
    ("core/reductions.py", "kept = torch.where(mask.bool(), x, torch.zeros_like(x))", "kept = x"),
    ("core/reductions.py", "masked_sum(x, mask, dim) / count.clamp(min=1)", "masked_sum(x, mask, dim) / mask.numel()"),
    ("core/reductions.py", "square * n / (n - 1).clamp(min=1) if unbiased", "square if unbiased"),
    ("core/reductions.py", "group_count(group, P).to(x.dtype).clamp(min=1))[group]", "len(x))[group]"),
    ("core/step.py", "there[part.rows] = v.detach()", "there[:len(part.rows)] = v.detach()"),
    ("core/step.py", "group=s.group + o)", "group=s.group)"),
    ("recipes/slots.py", "torch.maximum(-A * step.ratio", "torch.minimum(-A * step.ratio"),
    ("recipes/slots.py", "torch.maximum(-A * step.ratio, -A * step.ratio.clamp(*self.region()))", "-A * step.ratio"),
    ("recipes/slots.py", "self.low if self.high is None else self.high", "self.low"),
    ("recipes/slots.py", "(step.logp - step.old).exp()", "(step.old - step.logp).exp()"),
    ("recipes/slots.py", "(group_std(step.reward, step.group) + 1e-4)", "(group_std(step.reward, step.group, False) + 1e-4)"),
    ("recipes/slots.py", "keepdim=True).clamp(min=1) / len(whole(step))", "keepdim=True).clamp(min=1) / len(step)"),
    ("recipes/slots.py", "step.mask / whole(step).mask.sum().clamp(min=1)", "step.mask / step.mask.sum().clamp(min=1)"),
    ("recipes/slots.py", "torch.exp(-d) + d - 1", "torch.exp(d) - d - 1"),
    ("recipes/slots.py", '"k2": d * d / 2', '"k2": d * d'),
    ("recipes/reinforce.py", "-spread(step.advantage, step) * step.logp", "spread(step.advantage, step) * step.logp"),
    ("recipes/rloo.py", "(n - 1).clamp(min=1)", "n"),
    ("recipes/reinforce_pp.py", "(mask.sum() - 1).clamp(min=1)", "len(mask)"),
    ("recipes/dr_grpo.py", "len(whole(step)) * need", "len(step) * need"),
    ("recipes/dapo.py", "group_mean(away, step.group) > 1e-6", "group_mean(away, step.group) >= 0"),
    ("recipes/gspo.py", "s.detach() * (step.logp - step.logp.detach()).exp()", "s * (step.logp - step.logp.detach()).exp()"),
    ("recipes/cispo.py", "weight = step.ratio.detach()", "weight = step.ratio"),
    ("recipes/entropy20.py", ">= threshold", "<= threshold"),
    ("training/loss.py", "part.weight * part.surrogate", "part.surrogate"),
    ("training/trainer.py", "into[p] + g if p in into else g", "g"),
    ("training/collect.py", '"rollout", trainer.done, round)', '"rollout", trainer.done)'),
    ("training/collect.py", "step.group.unique()[:trainer.size[0]]", "step.group.unique()"),
    ("training/loss.py", "batch.whole = replace(detached(batch), whole=None)", "batch.whole = None"),
    ("training/loss.py", "plain.weight = checked(recipe.weight(plain)", "plain.weight = checked(0 * recipe.weight(plain) + 1"),
    ("training/loss.py", "part.surrogate + part.penalty)", "part.surrogate)"),
    ("training/supply.py", "step.ref = score(reference, step, step.law)", "step.ref = score(policy, step, step.law)"),
    ("training/collect.py", "kept.append(step if step.keep.all() else take(step, step.keep))", "kept.append(step)"),
    ("training/trainer.py", "torch.autograd.grad(loss, list", "torch.autograd.grad(-loss, list"),
    ("training/trainer.py", "min(1.0, self.clip / (float(norm) + 1e-6))", "1.0"),
    ("recipes/dr_grpo.py", "step.reward - group_mean(step.reward, step.group)", "step.reward - step.reward.mean()"),
    ("training/health.py", "(step.ratio > high) & (A > 0)", "(step.ratio > high) & (A < 0)"),
    ("training/health.py", "torch.exp(log_ratio) - 1 - log_ratio", "torch.exp(log_ratio) - 1 + log_ratio"),
    ("training/health.py", "(solved[there] == 0)", "(solved[there] < 1)"),
)

STABILISERS = (   # the same, and the tests that must notice
    ("recipes/stapo.py", "(H < masked_quantile", "(H > masked_quantile", "test_stabilisers_a.py"),
    ("recipes/stapo.py", "(p < self.tau_p)", "(p > self.tau_p)", "test_stabilisers_a.py"),
    ("recipes/stapo.py", 'mask * (need(batch, "weight") != 0)).sum()', "mask).sum()", "test_stabilisers_a.py"),
    ("recipes/clip_cov.py", "(cov > self.low)", "(cov < self.low)", "test_stabilisers_a.py"),
    ("recipes/kl_cov.py", "least(batch, -cov", "least(batch, cov", "test_stabilisers_a.py"),
    ("recipes/apo_viewr1.py", "around = whole(step)", "around = step", "test_stabilisers_b.py"),
    ("recipes/apo_viewr1.py", "(step.advantage, step) > 0)", "(step.advantage, step) < 0)", "test_stabilisers_b.py"),
    ("recipes/trust_grpo.py", "gap.clamp(max=0).exp()", "gap.exp()", "test_stabilisers_b.py"),
    ("recipes/observe_r1.py", "> self.beyond:", ">= 0:", "test_stabilisers_c.py"),
    ("recipes/rif.py", "(right >= self.least)", "(right > self.least)", "test_stabilisers_c.py"),
    ("recipes/route_diversity.py", "* v * (step.correct > 0)", "* v", "test_stabilisers_c.py"),
    ("recipes/prefix_rft.py", "[need(step, \"entropy\")[given].argsort(", "[(-need(step, \"entropy\"))[given].argsort(", "test_blends.py"),
    ("recipes/prefix_rft.py", "hybrid & (n == 1), R,", "hybrid & (n == 1), 0 * R,", "test_blends.py"),
    ("recipes/beside.py", "token_mean(step.demos)", "token_mean(step.demos) * 2", "test_blends.py"),
    ("recipes/amft.py", "flat(sft) - flat(rl)", "flat(rl) - flat(sft)", "test_blends.py"),
    ("recipes/vision_r1.py", "0.0 if v < least else", "0.0 if v <= least else", "test_blends.py"),
    ("recipes/grpo_ats.py", "max(self.cold, COLD)", "COLD", "test_blends.py"),
    ("recipes/lav_cot.py", "left + (x != y)", "left + 1", "test_blends.py"),
    ("recipes/rlp.py", "step.target_logp - step.target_base", "step.target_base - step.target_logp", "test_blends.py"),
    ("recipes/guided.py", "~step.truncated", "step.truncated", "test_blends.py"),
    ("recipes/thinktuning.py", "held + self.gamma", "held - self.gamma", "test_blends.py"),
    ("recipes/dualformer.py", "out[:-1] if checks else out", "out", "test_blends.py"),
)

LATER = (   # the same, and the one test that must notice: selections, stages, what is asked between them, the engine
    ("selection/selection.py", "(*sameness(i), i.demo)", "(i.prompt, i.answer, i.demo)", "test_selection.py::test_duplicates_are_counted_by_what_they_are"),
    ("selection/selection.py", "if not 0 < budget <= 1:", "if not 0 <= budget <= 1:", "test_selection.py::test_a_budget_out_of_range_is_refused[0-dose]"),
    ("selection/selection.py", "if not of_kind(value, kind) or (limit", "if (limit", "test_selection.py::test_every_option_of_every_selector_is_checked[less-rank]"),
    ("selection/selection.py", "(LIMITS | self.limits).get(k)", "LIMITS.get(k)", "test_selection.py::test_every_option_of_every_selector_is_checked[less-rank]"),
    ("selection/chosen.py", "[k % len(pool) for k in range(step.drawn,", "[k % len(pool) for k in range(step.size[0],", "test_selection.py::test_an_ordered_selection_is_walked_in_order"),
    ("selection/orders.py", "some, loss = pick(len(items), budget, stream)", "some, loss = pick(len(items), None, stream)", "test_selection.py::test_every_selector_selects[cyclical]"),
    ("selection/gain.py", "learned = gain >= least", "learned = gain < math.inf", "test_selection.py::test_marks_anywhere_are_as_many"),
    ("selection/synthesis.py", "for _ in range(m) if of[s]]", "for _ in range(1) if of[s]]", "test_selection.py::test_a_profile_decides_what_is_written"),
    ("selection/mixtures.py", "n <= hard * samples", "n >= hard * samples", "test_selection.py::test_what_is_missing_is_what_fails"),
    ("training/battery.py", "self.right[-1][k] - self.right[self.since(k)][k]", "self.right[-1][k] - self.right[0][k]", "test_battery.py::test_backward_transfer_by_hand"),
    ("training/battery.py", "if self.since(k) < len(self.rows) - 1]", "if self.since(k) < len(self.rows)]", "test_battery.py::test_backward_transfer_by_hand"),
    ("training/stages.py", "if \"{\" in value:", "if False:", "test_pipeline.py::test_bad_plans"),
    ("training/pipeline.py", "if name in (*stages, \"previous\") or not name", "if name == \"previous\" or not name", "test_pipeline.py::test_bad_plans"),
    ("engines/fit.py", "if isinstance(recipe, Lesson):", "if False:", "test_engine_trl.py::test_what_can_t_be_is_one_sentence_and_nothing_is_written"),
    ("engines/config.py", "if not isinstance(policy, HuggingPolicy):", "if False:", "test_engine_trl.py::test_what_can_t_be_is_one_sentence_and_nothing_is_written"),
)

RUNNER = """
import json, os, sys
import hypothesis, pandas, pytest, torch, torch._dynamo
_, fast, only, folders = sys.argv
for folder in json.loads(folders):
    pid = os.fork()          # torch is imported once; the package is imported anew by each child
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open("out.txt", os.O_CREAT | os.O_WRONLY), 1)
        sys.path.insert(0, folder)
        import rlworkbench
        assert rlworkbench.__file__.startswith(folder)
        code = pytest.main([*("tests/" + f for f in json.loads(fast)), "-k", only, "-x", "-q", "--tb=line", "-p", "no:cacheprovider"])
        sys.stdout.flush()
        os._exit(int(code))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def name(mutant) -> str:
    file, old, new, *_ = mutant
    return f"{file}: {old}  ->  {new}"


def plant(folder: Path, mutant=None) -> Path:
    "A copy of the package and of the fast tests, with one line made wrong."
    shutil.copytree(ROOT / "rlworkbench", folder / "rlworkbench", ignore=shutil.ignore_patterns("assets"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("benchmarks"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    (folder / "rlworkbench" / "assets").symlink_to(ROOT / "rlworkbench" / "assets")
    if mutant is not None:
        path, (_, old, new, *_) = folder / "rlworkbench" / mutant[0], mutant
        path.write_text(path.read_text().replace(old, new))
    return folder


def run(folders: list, files=FAST, only=ONLY) -> list:
    "Exit codes of pytest in each folder: 0 all passed, 1 something failed."
    command = [sys.executable, "-c", RUNNER, json.dumps(files), only, json.dumps([str(f) for f in folders])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folders[0])
    codes = [int(c) for c in done.stdout.split()]
    assert len(codes) == len(folders), done.stderr[-2000:]
    return codes


@pytest.mark.parametrize("mutant", [*MUTANTS, *STABILISERS, *LATER], ids=name)
def test_mutant_can_be_made(mutant):
    """What a mutant replaces stands in its file exactly once; else the list has grown stale."""
    file, old, new, *_ = mutant
    assert (ROOT / "rlworkbench" / file).read_text().count(old) == 1
    compile((ROOT / "rlworkbench" / file).read_text().replace(old, new), file, "exec")


@pytest.mark.slow
def test_tests_notice_mutants(tmp_path):
    """At least 95 of 100 mutants make the fast tests fail, and the package as it is does not."""
    folders = [plant(tmp_path / "as-it-is"), *(plant(tmp_path / str(i), m) for i, m in enumerate(MUTANTS))]
    baseline, *codes = run(folders)
    assert baseline == 0, (folders[0] / "out.txt").read_text()[-2000:]
    assert set(codes) <= {0, 1}, [(name(m), c) for m, c in zip(MUTANTS, codes) if c not in (0, 1)]
    survivors = [name(m) for m, code in zip(MUTANTS, codes) if code == 0]
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants caught", *survivors, sep="\n  survived: ")
    assert len(MUTANTS) >= 20 and 1 - len(survivors) / len(MUTANTS) >= SHARE, survivors


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted({m[3] for m in STABILISERS}))
def test_the_stabilisers_tests_notice_theirs(tests, tmp_path):
    """Every one of them, and the recipes as they are pass."""
    mutants = [m for m in STABILISERS if m[3] == tests]
    folders = [plant(tmp_path / "as-it-is"), *(plant(tmp_path / str(i), m) for i, m in enumerate(mutants))]
    baseline, *codes = run(folders, (tests,), "not refused_in_one_sentence")
    assert baseline == 0, (folders[0] / "out.txt").read_text()[-2000:]
    assert [(name(m), code) for m, code in zip(mutants, codes) if code != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("wing", sorted({m[0].partition("/")[0] for m in LATER}))
def test_a_few_fast_tests_notice_the_later_ones(wing, tmp_path):
    """Every one of them, and the package as it is passes."""
    mutants = [m for m in LATER if m[0].startswith(f"{wing}/")]
    folders = [plant(tmp_path / "as-it-is"), *(plant(tmp_path / str(i), m) for i, m in enumerate(mutants))]
    baseline, *codes = run(folders, sorted({m[3] for m in mutants}), "")
    assert baseline == 0, (folders[0] / "out.txt").read_text()[-2000:]
    assert [(name(m), code) for m, code in zip(mutants, codes) if code != 1] == []
