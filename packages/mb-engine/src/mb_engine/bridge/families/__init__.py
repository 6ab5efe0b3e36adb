# SPDX-License-Identifier: Apache-2.0
"""The families of models that the bridge knows, a file each."""
