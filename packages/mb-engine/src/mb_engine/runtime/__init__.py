# SPDX-License-Identifier: Apache-2.0
"""What a rank runs on: device, process groups, random numbers, and megatron-core's own needs."""
