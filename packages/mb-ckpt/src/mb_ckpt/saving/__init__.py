# SPDX-License-Identifier: Apache-2.0
"""From a state to durable files: staging, who stores what, and writing behind the training."""
