# SPDX-License-Identifier: Apache-2.0
"""What low precision needs of a machine, and what of it a checkpoint keeps."""
