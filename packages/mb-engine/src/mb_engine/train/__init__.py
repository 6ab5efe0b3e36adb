# SPDX-License-Identifier: Apache-2.0
"""Training: batch sizes, schedules, the optimizer, the loop and what a checkpoint keeps."""
