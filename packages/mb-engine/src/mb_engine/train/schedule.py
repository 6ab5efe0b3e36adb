# SPDX-License-Identifier: Apache-2.0
"""Learning rate and weight decay as pure functions of the samples consumed.

All lengths are in samples, so that a batch-size ramp-up does not bend the curves. With ``n``
samples consumed, warm-up ``w``, decay ``d``, WSD tail ``s``, peak ``L``, floor ``l`` and warm-up
start ``i``:

- ``w > 0`` and ``n <= w``: ``i + (L - i) n / w``
- constant: ``L``; every other style is ``l`` once ``n > d``
- linear, cosine: ``l + c (L - l)`` with ``r = (n - w) / (d - w)`` and ``c = 1 - r`` or
  ``(1 + cos(pi r)) / 2``
- inverse-square-root: ``max(l, L sqrt(max(w, 1)) / sqrt(max(n, 1)))``
- WSD: ``L`` until ``d - s``, then ``l + c (L - l)`` with ``q = (n - (d - s)) / s`` and ``c`` one of
  ``1 - q`` (linear), ``(1 + cos(pi q)) / 2`` (cosine), ``2 * 0.5**q - 1`` (exponential),
  ``1 - sqrt(q)`` (minus_sqrt)

Source: Loshchilov and Hutter 2017 (cosine, arXiv:1608.03983); Hu et al. 2024 (WSD,
arXiv:2404.06395); Hägele et al. 2024 (minus_sqrt, arXiv:2405.18392); the conventions at the
boundaries are megatron-core's ``OptimizerParamScheduler``, which the tests compare against.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from attrs import asdict, define, evolve, field, fields_dict, frozen
from attrs.validators import ge, in_
from mb_config.errors import ConfigError, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mb_config import ConfigContainer

_WSD: Mapping[str, Callable[[float], float]] = {
    "linear": lambda q: 1.0 - q,
    "cosine": lambda q: 0.5 * (math.cos(math.pi * q) + 1.0),
    "exponential": lambda q: 2.0 * math.pow(0.5, q) - 1.0,
    "minus_sqrt": lambda q: 1.0 - math.sqrt(q),
}
_WEIGHT_DECAY: Mapping[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * (1.0 - ratio)) + 1.0),
}
LR_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_CONFIG_FIELD = {
    "max_lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "start_wd": "scheduler.start_weight_decay",
    "end_wd": "scheduler.end_weight_decay",
    "wd_incr_style": "scheduler.weight_decay_incr_style",
}


@frozen(kw_only=True)
class Schedule:
    """Curves of learning rate and weight decay; the names are those megatron-core saves.

    Attributes:
        max_lr: Peak learning rate.
        min_lr: Learning rate after the decay.
        lr_warmup_init: Learning rate of the first step when there is a warm-up.
        lr_warmup_steps: Length of the warm-up in samples.
        lr_decay_steps: Samples at which the decay ends, the warm-up included.
        lr_decay_style: ``constant``, ``linear``, ``cosine``, ``inverse-square-root`` or ``WSD``.
        wsd_decay_steps: Length of the WSD tail in samples; None for the whole decay.
        lr_wsd_decay_style: ``linear``, ``cosine``, ``exponential`` or ``minus_sqrt``.
        start_wd, end_wd: Weight decay at the start and from ``wd_incr_steps`` on.
        wd_incr_steps: Length of the weight-decay ramp in samples.
        wd_incr_style: ``constant``, ``linear`` or ``cosine``.

    Raises:
        ConfigError: The values contradict each other.
    """

    max_lr: float = field(converter=float)
    min_lr: float = field(default=0.0, validator=ge(0.0))
    lr_warmup_init: float = 0.0
    lr_warmup_steps: int = field(default=0, validator=ge(0))
    lr_decay_steps: int = field(default=1, validator=ge(1))
    lr_decay_style: str = field(default="linear", validator=in_(LR_STYLES))
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str = field(default="exponential", validator=in_(tuple(_WSD)))
    start_wd: float = field(default=0.0, validator=ge(0.0))
    end_wd: float = field(default=0.0, validator=ge(0.0))
    wd_incr_steps: int = field(default=1, validator=ge(0))
    wd_incr_style: str = field(default="constant", validator=in_(("constant", *_WEIGHT_DECAY)))

    def __attrs_post_init__(self) -> None:
        rules = (
            (self.max_lr >= self.min_lr, "max_lr", f"must be >= min_lr={self.min_lr}"),
            (self.lr_warmup_init <= self.max_lr, "lr_warmup_init", f"must be <= lr={self.max_lr}"),
            (
                self.lr_warmup_steps < self.lr_decay_steps,
                "lr_warmup_steps",
                f"must be < lr_decay_steps={self.lr_decay_steps}",
            ),
            (self.end_wd >= self.start_wd, "end_wd", f"must be >= start_wd={self.start_wd}"),
            (
                self.wd_incr_style != "constant" or self.start_wd == self.end_wd,
                "end_wd",
                f"must equal start_wd={self.start_wd} with weight_decay_incr_style='constant'",
            ),
        )
        broken = [
            Violation(
                field=_dotted(name),
                value=str(getattr(self, name)),
                rule=rule,
                remedy="change one of the two",
            )
            for holds, name, rule in rules
            if not holds
        ]
        if broken:
            raise ConfigError.from_violations(broken)

    @classmethod
    def from_config(cls, config: ConfigContainer) -> Schedule:
        """Return the schedule of a resolved *config* (``finalize`` has been called)."""
        optimizer, scheduler = config.optimizer, config.scheduler
        decay = optimizer.weight_decay
        assert scheduler.lr_warmup_steps is not None, "the configuration is not resolved"
        assert scheduler.lr_decay_steps is not None, "the configuration is not resolved"
        assert scheduler.wd_incr_steps is not None, "the configuration is not resolved"
        start, end = scheduler.start_weight_decay, scheduler.end_weight_decay
        return cls(
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_init=scheduler.lr_warmup_init,
            lr_warmup_steps=scheduler.lr_warmup_steps,
            lr_decay_steps=scheduler.lr_decay_steps,
            lr_decay_style=scheduler.lr_decay_style,
            wsd_decay_steps=scheduler.wsd_decay_steps,
            lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
            start_wd=decay if start is None else start,
            end_wd=decay if end is None else end,
            wd_incr_steps=scheduler.wd_incr_steps,
            wd_incr_style=scheduler.weight_decay_incr_style,
        )

    def learning_rate(self, samples: int) -> float:
        """Return the learning rate after *samples* have been consumed."""
        return learning_rate(samples, self)

    def weight_decay(self, samples: int) -> float:
        """Return the weight decay after *samples* have been consumed."""
        return weight_decay(samples, self)


def learning_rate(samples: int, schedule: Schedule) -> float:
    """Return the learning rate after *samples* consumed; see the module for the formulas."""
    c = schedule
    if c.lr_warmup_steps > 0 and samples <= c.lr_warmup_steps:
        return c.lr_warmup_init + (c.max_lr - c.lr_warmup_init) * samples / c.lr_warmup_steps
    if c.lr_decay_style == "constant":
        return c.max_lr
    if samples > c.lr_decay_steps:
        return c.min_lr
    if c.lr_decay_style == "inverse-square-root":
        decayed = c.max_lr * math.sqrt(max(c.lr_warmup_steps, 1)) / math.sqrt(max(samples, 1))
        return max(c.min_lr, decayed)
    return c.min_lr + _decay_coefficient(samples, c) * (c.max_lr - c.min_lr)


def _decay_coefficient(samples: int, c: Schedule) -> float:
    """Return the share of ``max_lr - min_lr`` that is left, in [0, 1]."""
    if c.lr_decay_style == "WSD":
        tail = c.lr_decay_steps if c.wsd_decay_steps is None else c.wsd_decay_steps
        past = samples - (c.lr_decay_steps - tail)
        return 1.0 if past <= 0 else _WSD[c.lr_wsd_decay_style](past / tail)
    ratio = (samples - c.lr_warmup_steps) / (c.lr_decay_steps - c.lr_warmup_steps)
    return _WSD[c.lr_decay_style](ratio)


def weight_decay(samples: int, schedule: Schedule) -> float:
    """Return the weight decay after *samples* consumed.

    ``start_wd + c (end_wd - start_wd)`` with ``c = r`` (linear) or ``(1 + cos(pi (1 - r))) / 2``
    (cosine), ``r = samples / wd_incr_steps``; ``end_wd`` afterwards.
    """
    c = schedule
    if c.wd_incr_style == "constant" or samples > c.wd_incr_steps or c.wd_incr_steps == 0:
        return c.end_wd
    coefficient = _WEIGHT_DECAY[c.wd_incr_style](samples / c.wd_incr_steps)
    return c.start_wd + coefficient * (c.end_wd - c.start_wd)


class HasParamGroups(Protocol):
    """Anything with torch-like parameter groups, such as a megatron optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups; the scheduler writes ``lr`` and ``weight_decay`` into each."""
        ...


_OVERRIDABLE = ("max_lr", "min_lr", "start_wd", "end_wd")


@define(kw_only=True)
class ParamScheduler:
    """Writes the scheduled learning rate and weight decay into an optimizer's groups.

    A group's ``max_lr``, ``min_lr``, ``start_wd`` and ``end_wd``, where they differ from the
    schedule's when the scheduler is made, replace them for that group; its ``lr`` is multiplied by
    ``lr_mult`` and its weight decay by ``wd_mult`` (both 1 where absent). Later changes of these
    keys, such as an optimizer's ``load_state_dict`` makes, have no effect.

    Attributes:
        optimizer: Its ``param_groups`` are written to.
        schedule: The curves.
        override_opt_param_scheduler: On load, keep this schedule whatever the checkpoint says.
        use_checkpoint_opt_param_scheduler: On load, take the checkpoint's schedule.
        num_steps: Samples consumed so far.
    """

    optimizer: HasParamGroups
    schedule: Schedule
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False
    num_steps: int = 0
    _overrides: list[dict[str, Any]] = field(init=False, repr=False)
    _group_schedules: list[Schedule] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise ConfigError.from_violations(
                [
                    Violation(
                        field="scheduler.override_opt_param_scheduler",
                        value="True",
                        rule="cannot be combined with use_checkpoint_opt_param_scheduler=True",
                        remedy="choose whether the configuration or the checkpoint wins",
                    )
                ]
            )
        self._overrides = [
            {k: g[k] for k in _OVERRIDABLE if k in g and g[k] != getattr(self.schedule, k)}
            for g in self.optimizer.param_groups
        ]
        self._follow(self.schedule)

    @property
    def lr(self) -> float:
        """Learning rate of groups without overrides, as it stands."""
        return self.schedule.learning_rate(self.num_steps)

    @property
    def weight_decay(self) -> float:
        """Weight decay of groups without overrides, as it stands."""
        return self.schedule.weight_decay(self.num_steps)

    def step(self, increment: int) -> None:
        """Count *increment* more samples and write the new values into every group."""
        self.num_steps += increment
        groups = self.optimizer.param_groups
        for group, schedule in zip(groups, self._group_schedules, strict=True):
            rate = schedule.learning_rate(self.num_steps)
            decay = schedule.weight_decay(self.num_steps)
            _write(group, "lr", rate * group.get("lr_mult", 1.0))
            group["weight_decay"] = decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: the fields of `Schedule` and ``num_steps``."""
        return {**asdict(self.schedule), "num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position saved in *state* and settle which schedule holds.

        By default every field that shapes the curves must be the same here and in *state*.
        Fields that *state* lacks are taken from here.

        Raises:
            ConfigError: They differ and neither policy is set; every differing field is named.
        """
        known = fields_dict(Schedule)
        saved = {k: v for k, v in state.items() if k in known}
        if not (self.override_opt_param_scheduler or self.use_checkpoint_opt_param_scheduler):
            self._require_same(saved)
        self.num_steps = int(state["num_steps"])
        taken = saved if self.use_checkpoint_opt_param_scheduler else {}
        self._follow(evolve(self.schedule, **taken))

    def _follow(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._group_schedules = [evolve(schedule, **override) for override in self._overrides]
        self.step(0)

    def _require_same(self, saved: Mapping[str, Any]) -> None:
        here = asdict(self.schedule)
        broken = [
            Violation(
                field=_dotted(name),
                value=str(here[name]),
                rule=f"differs from {saved[name]} in the checkpoint",
                remedy="set it to the same, or set scheduler.override_opt_param_scheduler=true "
                "(keep the configuration) or use_checkpoint_opt_param_scheduler=true "
                "(keep the checkpoint)",
            )
            for name in _fields_that_matter(self.schedule)
            if name in saved and saved[name] != here[name]
        ]
        if broken:
            raise ConfigError.from_violations(broken)


def _write(group: dict[str, Any], name: str, value: float) -> None:
    """Set a number of *group*, in place where it is a tensor that a captured CUDA graph reads."""
    if hasattr(group.get(name), "fill_"):
        group[name].fill_(value)
    else:
        group[name] = value


def build_scheduler(config: ConfigContainer, optimizer: HasParamGroups) -> ParamScheduler:
    """Return the scheduler of a resolved *config* for *optimizer*, at zero samples."""
    return ParamScheduler(
        optimizer=optimizer,
        schedule=Schedule.from_config(config),
        override_opt_param_scheduler=config.scheduler.override_opt_param_scheduler,
        use_checkpoint_opt_param_scheduler=config.scheduler.use_checkpoint_opt_param_scheduler,
    )


def _fields_that_matter(c: Schedule) -> list[str]:
    """Return the fields that shape the curves of *c*; the others may differ without effect."""
    names = ["lr_decay_style", "max_lr", "lr_warmup_steps"]
    if c.lr_warmup_steps:
        names.append("lr_warmup_init")
    if c.lr_decay_style != "constant":
        names += ["min_lr", "lr_decay_steps"]
    if c.lr_decay_style == "WSD":
        names += ["wsd_decay_steps", "lr_wsd_decay_style"]
    names += ["wd_incr_style", "start_wd", "end_wd"]
    if c.wd_incr_style != "constant":
        names.append("wd_incr_steps")
    return names


def _dotted(name: str) -> str:
    return _CONFIG_FIELD.get(name, f"scheduler.{name}")
