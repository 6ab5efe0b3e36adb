# SPDX-License-Identifier: Apache-2.0
"""From a step to a state of any layout: what fits what, and which bytes to read."""
