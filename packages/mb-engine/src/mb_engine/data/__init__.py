# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, data sets, and the order in which ranks read them."""

from mb_engine.data.datasets import Datasets, build_datasets
from mb_engine.data.errors import DataError
from mb_engine.data.mock import MockDataset
from mb_engine.data.tokenizers import Tokenizer, build_tokenizer
from mb_engine.data.windows import TokenWindows

__all__ = [
    "DataError",
    "Datasets",
    "MockDataset",
    "TokenWindows",
    "Tokenizer",
    "build_datasets",
    "build_tokenizer",
]
