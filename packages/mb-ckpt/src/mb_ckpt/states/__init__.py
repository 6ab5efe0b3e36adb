# SPDX-License-Identifier: Apache-2.0
"""What a state is made of: pieces of tensors, plain data, and where each value belongs."""
