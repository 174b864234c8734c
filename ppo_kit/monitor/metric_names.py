"""The names of ``metrics.jsonl``, with what each is. Pictures and records read them without torch."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "step": "PPO step, counted from 1",
    "score": "raw score of the reward, mean over the responses that it scored [reward units]",
    "gold_score": "gold reward of the same responses, where one exists, mean over responses [gold units]",
    "score_mean": "running mean of the score that ScoreNormalize and ScoreScale hold [reward units]",
    "score_std": "running standard deviation of the score that they hold [reward units]",
    "abstained_fraction": "fraction of responses that the reward gave no score to [0 to 1]",
    "kl": "KL(policy, reference) estimated from the sampled tokens, mean over actions [nats per token]",
    "perplexity": "exp of the mean negative log-probability of the actions under the policy that drew them",
    "response_length": "length of a response with its end-of-sequence token, mean over responses [tokens]",
    "policy_loss": "policy loss alone (not PTX, KL, entropy), mean over trained tokens of all minibatches; "
    "over responses where the loss is a mean over sequences",
    "value_loss": "loss of the critic, averaged as policy_loss",
    "ptx_loss": "PTX loss, minus the log-probability of SFT text, times its weight, averaged as policy_loss",
    "kl_loss": "KL to the reference as a loss, times its weight, averaged as policy_loss",
    "entropy_loss": "entropy bonus as a loss, times its weight, averaged as policy_loss",
    "ratio": "π(token) / π_old(token), mean over trained tokens; 1 before the first optimizer step",
    "clip_fraction": "fraction of trained tokens whose gradient the clip stops: the ratio is out of the clip "
    "range on the side that the advantage pushes it to [0 to 1]",
    "value_clip_fraction": "fraction of trained tokens where the clipped error is the larger one, so that "
    "the critic has no gradient [0 to 1]",
    "approx_kl": "KL(π_old, π) of the update, estimator k3, mean over trained tokens [nats per token]",
    "entropy": "entropy of the distribution that each action was drawn from, mean over actions [nats]",
    "advantages": "advantage after the shaping chain, mean over actions [reward units, or none if whitened]",
    "returns": "return, the critic's target, mean over actions [reward units]",
    "values": "critic's value at rollout, mean over actions [reward units]",
    "explained_variance": "1 - Var(returns - values) / Var(returns) over actions; 1 is a perfect critic, "
    "0 a constant one",
    "grad_norm": "global norm of the policy's gradient before clipping, mean over optimizer steps",
    "lr": "learning rate of the policy at the end of the step",
    "critic_lr": "learning rate of the critic at the end of the step",
    "kl_coef": "weight of the KL penalty in the reward of this step",
    "truncated_fraction": "fraction of responses that ended by length, without end-of-sequence [0 to 1]",
    "tokens_per_second": "response tokens generated and trained on per second of the whole step [tokens/s]",
    "score_min": "least score of the step's responses [reward units]",
    "score_max": "greatest score of the step's responses [reward units]",
    "score_spread": "standard deviation of the step's scores over responses [reward units]",
    "response_length_min": "shortest response [tokens]",
    "response_length_max": "longest response [tokens]",
    "response_length_spread": "standard deviation of the lengths [tokens]",
    "ended_length": "mean length of the responses that ended with an end-of-sequence token [tokens]",
    "advantages_min": "least advantage of an action",
    "advantages_max": "greatest advantage of an action",
    "advantages_spread": "standard deviation of the advantages over actions",
    "equal_group_fraction": "fraction of prompts with several responses whose scores are all equal: groups "
    "without a gradient in GRPO and RLOO [0 to 1]",
    "repetition": "fraction of a response's 3-grams that occur earlier in it, mean over responses [0 to 1]",
    "distinct_2": "distinct 2-grams of the step's responses over all their 2-grams [0 to 1]",
    "sampler_kl_k1": "KL(sampler, scorer), where sampler_log_probs exist, estimator k1 [nats per token]",
    "sampler_kl_k3": "the same, estimator k3 [nats per token]",
    "sampler_effective_size": "effective sample size of the weights π_old / π_sampler, as a fraction of the "
    "actions; 1 where sampler and scorer agree [0 to 1]",
    "seconds_rollout": "time spent generating [s]",
    "seconds_score": "time spent in the reward, reference and critic models [s]",
    "seconds_train": "time spent in optimizer steps [s]",
}
"""Name -> what it is, and its unit: the standard ones, in the order of ``metrics.jsonl``. Others may be
logged beside them. ``docs/metrics.md`` is ``metrics_page()``."""

TIMINGS = frozenset(name for name in METRICS if name.startswith("seconds_")) | {"tokens_per_second"}
"""The metrics that depend on the clock: two equal runs differ in them."""


def metrics_page() -> str:
    """The text of ``docs/metrics.md``.

    >>> "| `grad_norm` | global norm of the policy's gradient" in metrics_page()
    True
    """
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in METRICS.items())
    return f"""# Metrics

`metrics.jsonl` of a run folder holds one object per PPO step. Every average is one sum over one count, \
over all tokens or all responses of the step and of all ranks; a value that is undefined is NaN. An *action* \
is a token that the policy chose (`action_mask`), a *trained token* one that is in the loss (`loss_mask`); \
see [the batch](batch.md).

| name | what it is [unit] |
|---|---|
{rows}

Other names are logged as they are: `<name>_loss` for a loss `loss_<name>` of your own, and its diagnostics; \
`score_<name>` for each part of a reward; `pass_at_<k>`, where every score is 0 or 1, for the fraction of \
prompts of which one of the k responses has a 1; what `metrics()` of a shaping part of your own returns.

This page is `ppo_kit.monitor.metrics_page()`, made from the table `METRICS`.
"""
