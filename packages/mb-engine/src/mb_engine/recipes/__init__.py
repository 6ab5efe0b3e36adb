# SPDX-License-Identifier: Apache-2.0
"""Configurations of well-known models, to pretrain them or to fine-tune them."""

from mb_engine.recipes.catalogue import Recipe, pretrain, recipe, recipes, sft

__all__ = ["Recipe", "pretrain", "recipe", "recipes", "sft"]
