# SPDX-License-Identifier: Apache-2.0
"""What a configuration will need before it is launched: memory, communication, time."""
