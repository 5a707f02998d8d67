"""Before anything loads libgomp: threads that wait at a barrier sleep, so that a busy machine slows the tests no more
than its share (spinning threads hold the cores that the others need: minutes became half an hour)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
