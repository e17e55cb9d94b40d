"""The knobs of fine-tuning, reward models and reinforcement learning: meaning, unit, legal range.

As `config.py`, which puts them together with the rest.
"""

import dataclasses
from typing import Any

from qwen_jax.config_values import require, require_choice

LOSS_MASKS = ("report", "released_script")
KL_ESTIMATORS = ("k1", "k2", "k3")
LORA_TARGETS = ("query", "key", "value", "out", "up", "gate", "down")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations are laid out and what of them is trained. Qwen report sec. 3.1.

    system: the system turn of conversations that bring none; empty for none. loss_mask: `report`
    (answers and the token that ends them) or `released_script` (besides, the control tokens of
    every turn), see `text/chatml.py`.
    """

    system: str
    loss_mask: str

    def __post_init__(self):
        require_choice("chat.loss_mask", self.loss_mask, LOSS_MASKS)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward model. Qwen report sec. 3.2.1.

    end_token: the control token at whose position the score is read; a token other than the one
    that ends a turn is put behind it. Which one the report's model uses is not known.
    """

    end_token: str

    def check_run(self, run: Any) -> None:
        """Checks the settings of the whole run (a `Config`) against what the stage does.

        Raises:
          ValueError: names the setting.
        """
        fix = "must be 0: a reward model is trained without"
        require(run.train.dropout == 0, "train.dropout", run.train.dropout, fix)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmarks run at each evaluation of the training, see `docs/evaluation.md`.

    tasks: names of `python -m qwen_jax.evaluate --tasks=list`; none for no benchmarks. data: the
    folder that holds them. limit: items of each task, spread over its parts, 0 for all. batch_size:
    items at once.
    """

    tasks: tuple[str, ...]
    data: str
    limit: int
    batch_size: int

    def __post_init__(self):
        require(self.limit >= 0, "benchmarks.limit", self.limit, "must not be negative")
        require(self.batch_size > 0, "benchmarks.batch_size", self.batch_size, "must be positive")
        if self.tasks:
            fix = "name the folder that holds the benchmarks"
            require(self.data != "", "benchmarks.data", self.data, fix)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights (Hu et al. 2021). Not in the report.

    rank: inner width r. alpha: adapters are scaled by alpha / r. targets: the matrices of each
    layer that get one, of `LORA_TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        require(self.rank > 0, "lora.rank", self.rank, "must be positive")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be positive")
        for target in self.targets:
            require_choice("lora.targets", target, LORA_TARGETS)
        require(len(self.targets) > 0, "lora.targets", self.targets, "name at least one matrix")


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """Reinforcement learning from a reward model. Qwen report sec. 3.2.2.

    reward_from: workdir or checkpoint of the reward model; the value model starts from it too.
    prompt_len, response_len: tokens of a query and of an answer at most. queries: queries of one
        rollout. responses_per_query: answers drawn for each. epochs: passes over a rollout; one
        optimizer step takes `data.batch_size` answers.
    gather_policy: before a rollout each device gets the policy in `model.compute_dtype`, all of it
        but what `mesh.tensor` splits, so that no weight moves for a token; False where it does not
        fit: then every layer is gathered for every token.
    temperature, top_p: of the rollouts. The log-probabilities that are trained are those of the
        untruncated distribution at this temperature.
    value_warmup_steps: optimizer steps at the start during which only the value model learns.
    kl_coef: weight of the divergence from the reference policy within the reward of each token.
        kl_estimator: `k1` is unbiased, `k2` and `k3` are other estimates of it (Schulman 2020).
    clip_ratio: bound on the policy's probability ratio. clip_value: bound on a value's change.
    discount, gae_lambda: of the advantage estimates. whiten_advantages: to mean 0 and deviation 1
        over the rollout.
    reward_clip: bound on the normalised score, 0 for none. scale_rewards: also divides scores by
        their running deviation (the report only speaks of the running mean). missing_end_penalty:
        subtracted from the score of an answer that does not end.
    calibration_queries: answers of the reference policy, one each, from which the gain and bias of
        the reward model are set before the first step; 0 leaves them.
    value_lr: peak rate of the value model; that of the policy is `optimizer.peak_lr`.
    pretrain_data: source spec of the text whose loss is added, empty for none; pretrain_coef: its
        weight; pretrain_rows: rows of `data.seq_len` in each optimizer step.
    ratio_tolerance: how far from 1 the ratio may be before the first update of a rollout; more is
        a fault and stops the run. max_kl: nats for each answer above which the log warns, 0 never.
    eval_data: source spec of held-out queries, empty for none; eval_queries: how many are answered
        (greedily) and scored at each evaluation.
    """

    reward_from: str
    prompt_len: int
    response_len: int
    queries: int
    responses_per_query: int
    epochs: int
    gather_policy: bool
    temperature: float
    top_p: float
    value_warmup_steps: int
    kl_coef: float
    kl_estimator: str
    clip_ratio: float
    clip_value: float
    discount: float
    gae_lambda: float
    whiten_advantages: bool
    reward_clip: float
    scale_rewards: bool
    missing_end_penalty: float
    calibration_queries: int
    value_lr: float
    pretrain_data: str
    pretrain_coef: float
    pretrain_rows: int
    ratio_tolerance: float
    max_kl: float
    eval_data: str
    eval_queries: int

    def __post_init__(self):
        positive = "prompt_len response_len queries responses_per_query epochs temperature"
        positive += " clip_ratio clip_value value_lr ratio_tolerance"
        for field in positive.split():
            require(
                getattr(self, field) > 0, f"ppo.{field}", getattr(self, field), "must be positive"
            )
        not_negative = "value_warmup_steps kl_coef reward_clip missing_end_penalty"
        not_negative += " calibration_queries pretrain_coef pretrain_rows max_kl eval_queries"
        for field in not_negative.split():
            require(
                getattr(self, field) >= 0,
                f"ppo.{field}",
                getattr(self, field),
                "must not be negative",
            )
        require(0 < self.top_p <= 1, "ppo.top_p", self.top_p, "must lie in (0, 1]; 1 is off")
        for field in ("discount", "gae_lambda"):
            require(
                0 <= getattr(self, field) <= 1,
                f"ppo.{field}",
                getattr(self, field),
                "must lie in [0, 1]",
            )
        require_choice("ppo.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require(
            bool(self.pretrain_data) == (self.pretrain_coef > 0) == (self.pretrain_rows > 0),
            "ppo.pretrain_data",
            self.pretrain_data,
            "give data, pretrain_coef and pretrain_rows together, or none of them",
        )

    def updates_per_rollout(self, batch_size: int) -> int:
        """Optimizer steps that one rollout feeds."""
        return self.epochs * self.queries * self.responses_per_query // batch_size

    def check_run(self, run: Any) -> None:
        """Checks these settings against those of the whole run (a `Config`).

        Raises:
          ValueError: names the setting that does not fit, and what would.
        """
        require(run.init_from != "", "init_from", "", "name the fine-tuned policy to start from")
        require(self.reward_from != "", "ppo.reward_from", "", "name the reward model")
        require(
            run.train.dropout == 0, "train.dropout", run.train.dropout, "must be 0 in ppo: the "
            "ratio of the new to the old policy would be noise",
        )  # fmt: skip
        answers = self.queries * self.responses_per_query
        require(
            answers % run.data.batch_size == 0,
            "data.batch_size",
            run.data.batch_size,
            f"must divide ppo.queries x ppo.responses_per_query = {answers}",
        )
        updates = self.updates_per_rollout(run.data.batch_size)
        for field, value in (
            ("train.steps", run.train.steps),
            ("checkpoint.every_steps", run.checkpoint.every_steps),
            ("train.eval_every", run.train.eval_every),
        ):
            require(
                value % updates == 0,
                field,
                value,
                f"must be a multiple of the {updates} steps that one rollout feeds",
            )
        require(
            self.pretrain_rows % run.train.num_microbatches == 0,
            "ppo.pretrain_rows",
            self.pretrain_rows,
            f"must be a multiple of train.num_microbatches = {run.train.num_microbatches}",
        )
