"""`python -m bench.gpu`: looks whether the tree is whole before it imports the rest of it."""

from __future__ import annotations

import sys

from bench.gpu import tree

reason = tree.why_incomplete()
if reason is not None:
    sys.exit(f"bench.gpu: {reason}")

from bench.gpu import command  # noqa: E402

sys.exit(command.main())
