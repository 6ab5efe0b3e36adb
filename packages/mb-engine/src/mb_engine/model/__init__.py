# SPDX-License-Identifier: Apache-2.0
"""The GPT model: from a configuration to the parts that this rank holds."""
