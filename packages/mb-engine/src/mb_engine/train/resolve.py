# SPDX-License-Identifier: Apache-2.0
"""Values of a configuration that only the tokenizer or the data can give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mb_config import ConfigContainer


def with_vocabulary(config: ConfigContainer, tokenizer: Any = None) -> ConfigContainer:
    """Return *config* with ``model.vocab_size``, taken from the tokenizer where it is not set.

    Raises:
        ConfigError: If the tokenizer has more tokens than ``model.vocab_size``.
    """
    from mb_config.errors import ConfigError, Violation

    from mb_engine.data.tokenizers import build_tokenizer

    tokenizer = tokenizer or build_tokenizer(config.tokenizer)
    size = config.model.vocab_size
    if size is None:
        return config.override(f"model.vocab_size={tokenizer.vocab_size}")
    if tokenizer.vocab_size > size:
        rule = Violation(
            field="model.vocab_size",
            value=str(size),
            rule=f"must hold the tokenizer's {tokenizer.vocab_size} tokens",
            remedy="leave it out to take the tokenizer's",
        )
        raise ConfigError.from_violations([rule])
    return config


def with_epochs(config: ConfigContainer, *, num_samples: int) -> ConfigContainer:
    """Return *config* with ``train.num_epochs`` turned into ``train.train_iters``.

    Args:
        config: Resolved but for the duration.
        num_samples: Samples in one epoch.
    """
    epochs = config.train.num_epochs
    if epochs is None:
        return config
    from mb_engine.train.batch_size import BatchSizeSchedule

    steps = BatchSizeSchedule.from_config(config).iterations_for_epochs(epochs, num_samples)
    return config.override(f"train.train_iters={steps}", "train.num_epochs=null")
