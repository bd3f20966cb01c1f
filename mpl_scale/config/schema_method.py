"""The sections mpl_scale.method and mpl_scale.optim: what a step does, and how what it learned is applied."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpl_scale.config.section import Count, CountOrZero, Fraction, NonNegative, Positive, Probability, Section, Share


class FeedbackConfig(Section):
    """The student's feedback h (equation 12, appendix C.3)."""

    rule: str = Field(
        "cosine",
        description="Registered: cosine, dot, loss_difference, none, flipped, per_sample, soft_exact, kekmodel.",
    )
    weight: float = Field(1.0, description="Multiplies h after the baseline is subtracted.")
    derivative: Literal["auto", "jvp", "difference"] = Field(
        "auto",
        description="How rules per_sample and soft_exact differentiate the student along its labelled gradient: by one "
        "forward-mode pass (jvp), exact in any precision, or by two passes with shifted weights (difference), in fp32 "
        "alone. auto: jvp, and difference with ZeRO-3, which gathers weights layer by layer.",
    )
    normalise: Literal["norms", "credits"] = Field(
        "norms",
        description="What rule soft_exact's credits are divided by. norms: the gradients' norms |g_u| |g_l|, as the "
        "cosine is. credits: their own root mean square, so that label smoothing does not change the size of the "
        "feedback.",
    )
    dropout: bool = Field(False, description="Whether the student's feedback passes drop anything.")
    baseline: bool = Field(True, description="Subtract a moving average of h (C.3).")
    baseline_decay: Probability = 0.99
    baseline_bias_correction: bool = Field(True, description="Divide the average by 1 - decay**t, as Adam does.")


class UDAConfig(Section):
    """Unsupervised data augmentation: the teacher's consistency loss (Table 7)."""

    weight: NonNegative = Field(1.0, description="UDA factor.")
    temperature: Positive = Field(0.7, description="Sharpens the weak view's distribution.")
    threshold: Probability = Field(0.0, description="Only images whose sharpened confidence reaches it count.")
    labelled_threshold: Probability = Field(
        1.0, description="Labelled images whose class has a larger probability do not count (C.4); 1: all count."
    )
    ramp_steps: CountOrZero = Field(0, description="Linear ramp of the weight: weight * min(1, step / ramp_steps).")


class FreeMatchConfig(Section):
    """The loss freematch: thresholds from the network's own confidence (Wang et al. 2023)."""

    decay: Probability = Field(0.999, description="Of its moving averages.")
    fairness_weight: NonNegative = Field(0.01, description="Of the fairness loss, whatever uda.weight is.")


class SoftMatchConfig(Section):
    """The loss softmatch: weights that fall below the average confidence (Chen et al. 2023)."""

    decay: Probability = Field(0.999, description="Of its moving averages.")
    max_weight: Positive = Field(1.0, description="The weight lambda at and above the average confidence.")
    sigmas: Positive = Field(
        1.0, description="Divides the Gaussian's standard deviation: 1 in the paper's equation, 2 in its authors' code."
    )
    alignment: Literal["uniform", "none"] = Field(
        "uniform", description="Whether confidences are compared after uniform alignment of the classes."
    )


class MethodConfig(Section):
    """The training method: what one step computes."""

    name: str = Field(
        "mpl",
        description="Registered: supervised, mixup, cutmix, pseudo_label, noisy_student, uda, fixmatch, flexmatch, "
        "freematch, softmatch, mpl, reduced_mpl.",
    )
    preset: Literal["paper", "exact", "released_code", "kekmodel_compat"] | None = Field(
        None, description="Sets the fields below that are not given: see mpl_scale/config/presets.py."
    )
    pseudo_labels: Literal["sampled", "argmax", "soft"] = "sampled"
    pseudo_label_view: Literal["weak", "strong"] = Field("weak", description="The view of x_u the teacher labels.")
    pseudo_label_temperature: Positive = 1.0
    pseudo_label_threshold: Probability = Field(
        0.95,
        description="Methods pseudo_label, noisy_student, fixmatch and flexmatch, and the losses of these names: least "
        "confidence (Table 6).",
    )
    feedback: FeedbackConfig = FeedbackConfig()
    teacher_loss: str = Field(
        "uda",
        description="Registered: uda, fixmatch, flexmatch, freematch, softmatch, supervised, mixup, cutmix, "
        "pseudo_label. What the teacher follows beside the feedback and in its warm-up (Table 10); its part on "
        "unlabelled images has the weight uda.weight.",
    )
    mixup_alpha: Positive = Field(1.0, description="mixup and cutmix: lambda ~ Beta(alpha, alpha).")
    supervised_weight: NonNegative = Field(1.0, description="Weight of the teacher's CE on labelled images.")
    uda: UDAConfig = UDAConfig()
    freematch: FreeMatchConfig = FreeMatchConfig()
    softmatch: SoftMatchConfig = SoftMatchConfig()
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    student_label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Smooths the pseudo labels."
    )
    student_sees_labelled: bool = Field(True, description="The student's pass includes x_l, for BN statistics only.")
    student_wait_steps: CountOrZero = Field(0, description="Steps with student learning rate 0 and feedback 0.")
    ema_decay: Probability = Field(0.999, description="Student EMA: rate min(decay, (t+1)/(t+10)); 0: none.")


Schedule = Literal["cosine", "linear", "exponential", "step", "one_cycle", "constant"]


class OptimConfig(Section):
    """Optimiser and schedule of one network."""

    name: str = Field("sgd", description="Registered: sgd, rmsprop, lars, adamw, lamb, muon.")
    lr: NonNegative
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = Field(
        0.0,
        description="Coupled L2, as in the released code; adamw, muon: decoupled, lr * weight_decay * w a step; lamb: "
        "part of the step that it scales; a parameter without decay is not scaled.",
    )
    layer_decay: Share = Field(
        1.0,
        description="A layer's rate is lr * layer_decay**(number of layers above it), as the model's group_matcher "
        "numbers them (timm's models have one); 1: one rate.",
    )
    decay_bn_and_bias: bool = Field(False, description="Whether weight decay covers BN parameters and biases.")
    rho: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="RMSProp: decay of the squared gradient.")
    eps: Positive = Field(1e-3, description="RMSProp: added under the root (TF variant).")
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        (0.9, 0.999), description="AdamW, LAMB, Muon: decay of the averages of the gradient and of its square."
    )
    adam_eps: Positive = Field(1e-8, description="AdamW, LAMB, Muon: added to the root.")
    trust: Positive = Field(1e-3, description="LARS: eta, a parameter's step as a share of its norm at lr 1.")
    schedule: Schedule = "cosine"
    warmup_steps: CountOrZero = Field(
        0, description="Linear: lr * (step + 1) / warmup_steps; one_cycle: the steps of its rise, two or more."
    )
    min_lr: NonNegative = Field(0.0, description="Schedules cosine, linear, one_cycle: the rate they fall to.")
    decay_rate: Fraction = Field(
        0.97, description="Exponential schedule: lr * rate**floor(step / decay_steps); step: a factor per milestone."
    )
    decay_steps: Count = Field(750, description="Exponential schedule.")
    milestones: list[Count] = Field([], description="Schedule step: steps of the phase, rising, warm-up included.")
    start_fraction: Fraction = Field(0.04, description="Schedule one_cycle: its first rate, as a share of lr.")

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        falls = self.schedule in ("cosine", "linear", "one_cycle")
        if self.min_lr > self.lr or (self.min_lr and not falls):
            raise ValueError(
                f"min_lr = {self.min_lr} with lr = {self.lr} and schedule {self.schedule}: it must be at most lr, and "
                "is for cosine, linear and one_cycle; set 0"
            )
        if bool(self.milestones) != (self.schedule == "step") or self.milestones != sorted(set(self.milestones)):
            raise ValueError(
                f"milestones = {self.milestones} with schedule {self.schedule}: schedule step needs rising "
                "steps, the others []"
            )
        if self.schedule == "one_cycle" and self.warmup_steps < 2:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: schedule one_cycle rises over two steps or more")
        return self


class FinetuneOptimConfig(OptimConfig):
    """The student's optimiser and schedule while it is finetuned: LARS in section 4."""

    lr: NonNegative = 1e-5
    schedule: Schedule = "constant"


class OptimsConfig(Section):
    """The optimiser of each network."""

    teacher: OptimConfig
    student: OptimConfig
