# SPDX-License-Identifier: Apache-2.0
"""The files of a step: manifest, packed arrays and zarr arrays, through tensorstore."""
