# SPDX-License-Identifier: Apache-2.0
"""Storage errors become one line with a remedy."""

from __future__ import annotations

import errno
import os

import pytest
from mb_ckpt.errors import storage_error
from mb_config.errors import UserError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk full while saving: free space"),
        (ValueError("RESOURCE_EXHAUSTED: x [tensorstore_spec='y"), "disk full while saving: free"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "check the permissions"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "check the permissions"),
        (ValueError("PERMISSION_DENIED: x"), "check the permissions"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "ulimit -f"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "saving failed: .*Input/output error"),
    ],
)
def test_each_kind_is_one_line_that_says_what_to_do(error, said):
    line = storage_error("saving", error)
    assert isinstance(line, UserError)
    assert "\n" not in str(line)
    assert "tensorstore_spec" not in str(line)
    with pytest.raises(UserError, match=said):
        raise line
