# SPDX-License-Identifier: Apache-2.0
"""How a model and its batches are spread over ranks."""
