# SPDX-License-Identifier: Apache-2.0
"""Look for modes that run but are wrong: ``python explore.py FOUND.jsonl``.

Every set of two features (three with ``--together 3``) that fits on four ranks and that
``finalize`` accepts is trained for a few steps and compared with one rank. What differs, or ends
in an error, is printed and written as a line of JSON each; it needs a rule in ``finalize``, or
mending. Sets that the file holds already are left out, so that a long search can be cut in two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

from attrs import frozen
from mb_config.errors import ConfigError
from mb_engine.testing import RankError, run_ranks, tiny_config
from mode_report import difference
from mode_rows import BASE, MOE, PRECISIONS, RAMP, SHARED_EXPERT
from mode_training import Run, train_guarded

MOST_RANKS = 4
TOGETHER_IN_ONE_CALL = 12
LOSS = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}
NORM = {"fp32": 1e-3, "bf16": 0.1, "fp16": 3e-2}


@frozen(kw_only=True)
class Feature:
    """Something that a run may have.

    Attributes:
        name: Short and unique.
        kind: Features of one kind exclude each other; empty excludes nothing.
        ranks: By how much it multiplies the ranks.
        mode: Overrides that must not change the result.
        shared: Overrides that the run on one rank has as well.
        precision: Of the row and its reference.
    """

    name: str
    kind: str = ""
    ranks: int = 1
    mode: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    precision: str = "fp32"


def fsdp(strategy):
    return (
        "ddp.use_megatron_fsdp=true",
        f"ddp.data_parallel_sharding_strategy={strategy}",
    )


def recompute(granularity, **fields):
    return (
        f"recompute.recompute_granularity={granularity}",
        *(f"recompute.recompute_{name}={value}" for name, value in fields.items()),
    )


def full(method):
    return recompute("full", method=method, num_layers=1)


DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
GRADS = ("ddp.overlap_grad_reduce=true", "ddp.bucket_size=4096")
TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VPP2 = "model.virtual_pipeline_model_parallel_size=2"
EP2 = "model.expert_model_parallel_size=2"
FEATURES = (
    Feature(name="TP2", kind="tp", ranks=2, mode=(TP2,)),
    Feature(name="TP2+SP", kind="tp", ranks=2, mode=(TP2, "model.sequence_parallel=true")),
    Feature(name="PP2", kind="pp", ranks=2, mode=(PP2,)),
    Feature(
        name="PP2 uneven",
        kind="pp",
        ranks=2,
        mode=(PP2, "model.num_layers_in_last_pipeline_stage=1"),
    ),
    Feature(name="PP2 VPP2", kind="pp", ranks=2, mode=(PP2, VPP2)),
    Feature(name="PP4", kind="pp", ranks=4, mode=("model.pipeline_model_parallel_size=4",)),
    Feature(
        name="PP4 VPP2",
        kind="pp",
        ranks=4,
        mode=("model.pipeline_model_parallel_size=4", VPP2),
        shared=("model.num_layers=8",),
    ),
    Feature(name="CP2", kind="cp", ranks=2, mode=("model.context_parallel_size=2",)),
    Feature(
        name="CP2 ring",
        kind="cp",
        ranks=2,
        mode=("model.context_parallel_size=2", "model.cp_comm_type=p2p"),
    ),
    Feature(name="EP2", kind="moe", ranks=2, mode=(EP2,), shared=MOE),
    Feature(
        name="EP2 alltoall",
        kind="moe",
        ranks=2,
        mode=(EP2, "model.moe_token_dispatcher_type=alltoall"),
        shared=SHARED_EXPERT,
    ),
    Feature(name="experts", kind="moe", shared=SHARED_EXPERT),
    Feature(
        name="experts, sequence aux loss",
        kind="moe",
        shared=(
            *MOE,
            "model.moe_router_load_balancing_type=seq_aux_loss",
            "model.moe_aux_loss_coeff=0.05",
        ),
    ),
    Feature(
        name="experts, capacity",
        kind="moe",
        shared=(*MOE, "model.moe_expert_capacity_factor=1.0"),
    ),
    Feature(
        name="experts, sigmoid",
        kind="moe",
        shared=(*MOE, "model.moe_router_score_function=sigmoid", "model.moe_router_dtype=fp32"),
    ),
    Feature(name="DP2", kind="dp", ranks=2),
    Feature(name="distributed optimizer", kind="optimizer", mode=(DISTRIBUTED,)),
    Feature(name="overlapped reduction", kind="optimizer", mode=GRADS),
    Feature(
        name="distributed optimizer, overlap",
        kind="optimizer",
        mode=(DISTRIBUTED, *GRADS, "ddp.overlap_param_gather=true"),
    ),
    Feature(name="FSDP optim", kind="optimizer", mode=fsdp("optim")),
    Feature(name="FSDP optim_grads", kind="optimizer", mode=fsdp("optim_grads")),
    Feature(name="FSDP optim_grads_params", kind="optimizer", mode=fsdp("optim_grads_params")),
    Feature(name="SGD", kind="optimizer", shared=("optimizer.optimizer=sgd",)),
    Feature(name="tied", shared=("model.share_embeddings_and_output_weights=true",)),
    Feature(
        name="LayerNorm, biases",
        shared=("model.normalization=LayerNorm", "model.add_bias_linear=true"),
    ),
    Feature(name="normalized queries", shared=("model.qk_layernorm=true",)),
    Feature(name="learned positions", shared=("model.position_embedding_type=learned_absolute",)),
    Feature(name="window", shared=("model.window_size=[5, 0]",)),
    Feature(name="dropout", shared=("model.hidden_dropout=0.2",)),
    Feature(name="mean a micro-batch", shared=("model.calculate_per_token_loss=false",)),
    Feature(name="ramp-up", kind="batch", shared=RAMP),
    Feature(
        name="2 samples",
        kind="batch",
        shared=("train.micro_batch_size=1", "train.global_batch_size=4"),
    ),
    Feature(name="no clipping", shared=("optimizer.clip_grad=0.0",)),
    Feature(name="zeros counted", mode=("optimizer.log_num_zeros_in_grad=true",)),
    Feature(name="TP-PP-DP order", mode=("dist.use_tp_pp_dp_mapping=true",)),
    Feature(name="full uniform", kind="recompute", mode=full("uniform")),
    Feature(name="full block", kind="recompute", mode=full("block")),
    Feature(name="selective", kind="recompute", mode=recompute("selective")),
    Feature(
        name="selective modules",
        kind="recompute",
        mode=recompute("selective", modules="[core_attn, mlp, layernorm]"),
    ),
    Feature(
        name="distributed activations",
        kind="recompute",
        mode=(*full("uniform"), "recompute.distribute_saved_activations=true"),
    ),
    Feature(name="bf16", kind="precision", shared=PRECISIONS["bf16"], precision="bf16"),
    Feature(
        name="fp16",
        kind="precision",
        shared=("mixed_precision=fp16_mixed", "optimizer.loss_scale=1024"),
        precision="fp16",
    ),
    Feature(
        name="bf16, float32 residuals",
        kind="precision",
        shared=(*PRECISIONS["bf16"], "model.fp32_residual_connection=true"),
        precision="bf16",
    ),
)
# Right, but not what one rank computes: each rank draws masks for what it alone has, and how many
# tokens an expert may take is counted on each rank. TP ranks without SP have all tokens.
NOT_COMPARABLE = {"dropout": {"TP2"}, "experts, capacity": {"TP2", "PP2", "PP2 uneven", "DP2"}}


@frozen(kw_only=True)
class Mix:
    """Some features together."""

    features: tuple[Feature, ...]

    @property
    def name(self):
        return " x ".join(feature.name for feature in self.features)

    @property
    def ranks(self):
        return math.prod(feature.ranks for feature in self.features)

    @property
    def reference(self):
        return (*BASE, *(text for feature in self.features for text in feature.shared))

    @property
    def overrides(self):
        return (*self.reference, *(text for feature in self.features for text in feature.mode))

    @property
    def precision(self):
        return next((f.precision for f in self.features if f.precision != "fp32"), "fp32")

    def possible(self):
        """Whether the features go together, on so many ranks, and one rank is their reference."""
        kinds = [feature.kind for feature in self.features if feature.kind]
        comparable = all(
            other.ranks == 1 or other.name in NOT_COMPARABLE[feature.name]
            for feature in self.features
            if feature.name in NOT_COMPARABLE
            for other in self.features
        )
        return len(set(kinds)) == len(kinds) and self.ranks <= MOST_RANKS and comparable

    def accepted(self):
        """Whether ``finalize`` takes the mix."""
        try:
            tiny_config(*self.overrides).finalize(self.ranks)
        except ConfigError:
            return False
        return True


def mixes(together, only):
    for features in itertools.combinations(FEATURES, together):
        mix = Mix(features=features)
        if all(any(o in f.name for f in features) for o in only) and mix.possible():
            yield mix


def run(part, ranks, steps):
    """Return what all ranks saw of each mix of *part*; a text where they failed."""
    found = _run(part, ranks, steps)
    if found is None or any(isinstance(r, str) for seen in found for r in seen):
        # An error may have spoilt what came after it.
        alone = [_run([mix], ranks, steps) or [["no result: died or hung"]] for mix in part]
        found = [one[0] for one in alone]
    return found


def _run(part, ranks, steps):
    runs = [Run(mix.overrides) for mix in part]
    try:
        by_rank = run_ranks(train_guarded, ranks, runs, steps, timeout_s=60 + 20 * len(part))
    except RankError as error:
        print(f"  {str(error).strip().splitlines()[-1]}")
        return None
    return [[rank[i] for rank in by_rank] for i in range(len(part))]


def verdict(mix, seen, reference):
    """Return ``ok``, or what is wrong."""
    texts = [r for r in (*seen, reference) if isinstance(r, str)]
    if texts:
        return f"error: {texts[0]}"
    found = difference(seen, reference)
    near = found.loss <= LOSS[mix.precision] and found.grad_norm <= NORM[mix.precision]
    return "ok" if near else f"wrong: {found}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("found", type=Path)
    parser.add_argument("--together", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=(), help="each in the name of some feature")
    parser.add_argument("--ranks", type=int, default=None, help="only mixes on so many ranks")
    arguments = parser.parse_args()
    done = set()
    if arguments.found.exists():
        done = {json.loads(line)["mix"] for line in arguments.found.read_text().splitlines()}
    candidates = [m for m in mixes(arguments.together, arguments.only) if m.name not in done]
    todo = [m for m in candidates if m.accepted() and arguments.ranks in (None, m.ranks)]
    print(f"{len(todo)} mixes to run; {len(candidates) - len(todo)} are refused or not asked for")
    wanted = dict.fromkeys(mix.reference for mix in todo)
    by_rank = run_ranks(
        train_guarded,
        1,
        [Run(key) for key in wanted],
        arguments.steps,
        timeout_s=60 + 10 * len(wanted),
    )
    references = dict(zip(wanted, by_rank[0], strict=True))
    bad = 0
    with arguments.found.open("a") as file:
        for ranks in sorted({mix.ranks for mix in todo}):
            group = [mix for mix in todo if mix.ranks == ranks]
            for start in range(0, len(group), TOGETHER_IN_ONE_CALL):
                part = group[start : start + TOGETHER_IN_ONE_CALL]
                for mix, seen in zip(part, run(part, ranks, arguments.steps), strict=True):
                    text = verdict(mix, seen, references[mix.reference])
                    if text != "ok":
                        bad += 1
                        print(f"{mix.name}: {text}", flush=True)
                    file.write(json.dumps({"mix": mix.name, "verdict": text}) + "\n")
                    file.flush()
    print(f"{bad} of {len(todo)} mixes are wrong or end in an error")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
