# SPDX-License-Identifier: Apache-2.0
"""A directory of steps: what is there, who may write, how a step comes to be and goes."""
