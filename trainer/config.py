"""Settings of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from thumbwheel.config import Address, CommandSettings, Settings

TaskName = Literal["policy", "reward"]


class LearningSettings(CommandSettings):
    """How to learn, wherever the samples come from."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the samples of a round."""

    batch_size: int = Field(default=8, ge=1)
    """Samples an optimizer step, at the most; a round is divided into steps as even as can be. The rollouts of one
    prompt are one sample."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises to its value."""

    learning_rate_decay: Literal["none", "linear"] = "none"
    """Whether the learning rate falls to zero over the steps of a round; for where one round is all there is."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the preferences (DPO's family, KTO) are held near the reference; larger is nearer."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of comparisons taken to be the wrong way round, by `cdpo` and `robust`."""

    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen responses' likelihood beside a loss of DPO's family (RPO's α)."""

    kl_weight: float = Field(default=0.05, ge=0)
    """Weight of the KL to the reference in `ppo`, `grpo` and `rloo`; 0 leaves it out."""

    kl_target: float = Field(default=0.0, ge=0)
    """KL a response, in nats, that `ppo` adapts its weight to; 0 keeps the weight as it is."""

    kl_horizon: int = Field(default=10_000, ge=1)
    """Responses over which `ppo` adapts that weight; larger is slower."""

    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """How far the ratio of new to old probability may count, in `ppo`, `grpo` and `rloo`."""

    value_clip_range: float = Field(default=0.2, gt=0)
    """How far a critic's value may move from its old one and count, in `ppo`."""

    discount: float = Field(default=1.0, gt=0, le=1)
    """γ of `ppo`."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation in `ppo`."""

    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Taken off the reward of a response that was cut at the length limit, in `ppo`, `grpo` and `rloo`."""

    reference_baseline: bool = True
    """Take the score of the reference's response off the reward, where a prompt has one. Matters in `ppo`."""

    critic_model: str = ""
    """Folder of the reward model that `ppo`'s critic begins from; without one, a zero head on the policy's body."""

    critic_learning_rate: float = Field(default=9e-6, gt=0)
    """Learning rate of the critic."""

    critic_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the critic learns alone."""

    importance_min: float = Field(default=0.5, ge=0, le=1)
    """Least weight of a token for being likelier now than when it was served, or less so."""

    importance_max: float = Field(default=5.0, ge=1)
    """Greatest weight of such a token."""

    length_balance: bool = True
    """Weigh pairs so that a `reward` model cannot learn from them that long, or short, is good."""

    score_penalty: float = Field(default=0.01, ge=0)
    """Weight of the squares of both scores of a pair in `reward`: it holds scores near zero."""

    ties: Literal["none", "davidson", "rao_kupper"] = "none"
    """What `reward` takes a tie to say; with `none` it learns nothing from ties."""

    tie_rate: float = Field(default=0.2, gt=0, lt=1)
    """Share of ties to expect between equally good responses, in `davidson` and `rao_kupper`."""

    margin_weight: float = Field(default=1.0, ge=0)
    """How far apart, in units of the score, `reward` is to keep a pair whose margin is 1."""

    head_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate of a `reward` model's heads; 0 is that of the rest of it."""

    reward_aspects: Annotated[tuple[str, ...], NoDecode] = ("helpfulness", "harmlessness", "fluency")
    """Aspects that a new reward model gets a head for each, separated by commas."""

    ensemble_heads: int = Field(default=4, ge=0, le=64)
    """Heads of a new reward model by whose spread it says how uncertain it is; 0 for none."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""

    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are scaled down to it."""

    max_length: int = Field(default=1024, ge=8)
    """Most tokens of a prompt and one response. Prompts lose their beginning; responses are never cut."""

    micro_batch_tokens: int = Field(default=0, ge=0)
    """Tokens that one forward and backward pass takes, padding included; what is longer recomputes its activations. 0
    takes what suits the device: 1,024 on a CPU, 4,096 on a GPU."""

    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA's matrices: they learn, and the weights beside them stay; 0 learns all weights."""

    lora_alpha: int = Field(default=16, gt=0)
    """LoRA's α: its matrices count α / rank."""

    seed: int = 0
    """Seed of the order of samples; the same events and the same settings give the same weights."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is divided among the ranks. 0: nothing; 1: the optimizer's state; 2: its gradients as
    well; 3: the weights as well. With one rank there is nothing to divide."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, always: a third slower, with less memory. What is longer than
    `micro_batch_tokens` does so anyway."""

    cpu_offload: bool = False
    """Keep master weights and the optimizer's state in the CPU's memory and step there, with `zero_stage` 1 to 3."""

    threads: int = Field(default=0, ge=0)
    """Threads to compute with; 0 leaves it to OMP_NUM_THREADS, or else to the number of cores."""

    @field_validator("reward_aspects", mode="before")
    @classmethod
    def _split_aspects(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value


class TrainerSettings(LearningSettings, Settings):
    """Learns from comparisons for ever, and publishes new versions of the policy and of the reward model.

    With `--data FILE` it learns from a file instead: see `python -m trainer --data FILE --help`.
    """

    listen: Address = "127.0.0.1:50054"
    """Address of gRPC health; port 0 takes any free one."""

    metrics_port: int = Field(default=9104, ge=0, le=65535)
    """Port of the Prometheus metrics, on the same host as `listen`."""

    tasks: Annotated[tuple[TaskName, ...], NoDecode] = ("policy", "reward")
    """What to train, separated by commas. With more than one they take turns, and only one is in memory at a time."""

    base_model: str = ""
    """Model that both roles begin from, where the store has none yet: a folder or a Hugging Face id."""

    init_only: bool = False
    """Publish the base model as version 0 of both roles where there is none, and end."""

    dry_run: bool = False
    """Say what would be trained from what, and end. Nothing is published, and nobody is asked."""

    round_size: int = Field(default=48, ge=1)
    """A round starts as soon as so many comparisons wait; it learns from so many, the oldest first."""

    min_round_size: int = Field(default=8, ge=1)
    """Fewer comparisons than this start no round, however long they wait (unless `round_size` is smaller)."""

    max_wait_seconds: float = Field(default=60.0, ge=0)
    """With at least `min_round_size`, a round starts once the oldest has waited so long."""

    policy_objective: str = "dpo"
    """Objective of the task `policy`, by its name in `trainer/losses`, or a mixture such as `dpo+0.1*sft`."""

    reward_objective: str = "reward"
    """Objective of the task `reward`, by its name in `trainer/losses`."""

    policy_learning_rate: float = Field(default=1e-6, gt=0)
    """Learning rate of the policy."""

    reward_learning_rate: float = Field(default=1e-5, gt=0)
    """Learning rate of the reward model."""

    policy: Address = "127.0.0.1:50051"
    """Address of the policy service, which rollouts come from."""

    reward: Address = "127.0.0.1:50052"
    """Address of the reward service, which scores them."""

    allow_insecure: bool = False
    """Send an API key to these two on other machines without TLS."""

    pairs_from: Literal["people", "reward_model", "both"] = "people"
    """Who says which response of a pair is better, for DPO's family. The reward model says it of rollouts."""

    rollout_responses: int = Field(default=4, ge=2, le=16)
    """Responses to a prompt, for `ppo`, `grpo`, `rloo`, and pairs by the reward model."""

    rollout_tokens: int = Field(default=256, ge=1)
    """Most tokens of such a response."""

    prompt_uses: int = Field(default=1, ge=1)
    """Rounds in which one prompt is answered. Prompts are those that people's feedback is about."""

    unjudged_prompts: bool = False
    """Also answer prompts that nobody gave feedback on, where the user agreed to be learnt from."""

    keep_versions: int = Field(default=20, ge=0)
    """Of each role, as many versions, the newest, keep their weights in the store, beside version 0. What older ones
    learnt from stays known. 0: all do."""

    voting_propensity: bool = True
    """Weigh thumbs by how seldom responses of their length are voted on, for `kto`; reads the topic `generations`."""

    min_reward_variance: float = Field(default=1e-6, ge=0)
    """Prompts whose responses' rewards vary less are left out: there is nothing to be learnt from them."""

    reward_pessimism: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """What is taken off a rollout's score for each standard deviation that the reward model's ensemble is unsure of it
    (over the reference's score, where it is known); 0 takes the score as it is."""

    max_staleness: int = Field(default=4, ge=0)
    """Rollouts are dropped where a part was written more than so many versions before the learning one."""

    replay_ratio: float = Field(default=0.0, ge=0)
    """Samples that are learnt again for each new one; rollouts never are."""

    demonstrations: Path | None = None
    """File of demonstrations, one JSON object a line, that objectives with `sft` mix in, beside people's edits."""

    demonstrations_ratio: float = Field(default=0.25, gt=0)
    """Demonstrations of that file for each other sample of a round."""

    max_kl: float = Field(default=100.0, ge=0)
    """Nothing is published beyond this KL to the reference, in nats a response; 0 is no bound."""

    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """Nothing is published where responses repeat more than this share of their 4-grams; 0 is no bound."""

    max_length_growth: float = Field(default=4.0, ge=0)
    """Nothing is published where responses are so many times as long as in the first round; 0 is no bound."""

    min_entropy_share: float = Field(default=0.1, ge=0, lt=1)
    """Nothing is published where the entropy of a token is less than this share of what it was in the first round."""

    min_diversity_share: float = Field(default=0.4, ge=0, lt=1)
    """Nothing is published where responses have less than this share of the distinct bigrams of the first round while
    their reward rose."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """Training checkpoints kept a task."""

    start_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long to wait for the broker at the start."""

    @property
    def training_path(self) -> Path:
        """Folder of the training checkpoints."""
        return self.home / "trainer"

    def learning_rate(self, task: TaskName) -> float:
        """The learning rate of a task."""
        return self.policy_learning_rate if task == "policy" else self.reward_learning_rate

    def objective(self, task: TaskName) -> str:
        """The name of a task's objective."""
        return self.policy_objective if task == "policy" else self.reward_objective

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: tuple[TaskName, ...]) -> tuple[TaskName, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name each of policy and reward at most once, and at least one of them")
        return value


class OfflineSettings(LearningSettings):
    """Learns from a file once, and writes the model into a folder.

    Each line of the file is a JSON object in one of TRL's formats: {prompt, chosen, rejected}, {prompt, completion,
    label}, {prompt, completion}, {messages}, each as text or as lists of messages; or, for ppo, grpo and rloo,
    {prompt, responses, rewards} with logprobs, finished and reference_reward where they are known.
    """

    data: Path
    """The file, one JSON object a line."""

    objective: str
    """What to learn by: a name in `trainer/losses`, or a mixture such as `dpo+0.1*sft`."""

    base_model: str = ""
    """Model to begin from, also the reference: a folder or a Hugging Face id; without one, the default model."""

    output: Path | None = None
    """Folder for the model; it must not be there yet. Without one, it is named after file and objective, beside it."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Learning rate of the model."""

    limit: int = Field(default=0, ge=0)
    """Read only so many lines; 0 reads all."""

    adapter: bool = False
    """With `lora_rank`: write LoRA's matrices alone, as peft reads them, instead of the whole model."""

    dry_run: bool = False
    """Say what would be learnt from what, and end."""

    @property
    def output_path(self) -> Path:
        """Where the model goes."""
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in self.objective)
        return self.output or self.data.with_name(f"{self.data.stem}-{name}")
