"""A token for the Ray clusters of the tests; Ray would keep one in the user's home. It is read when Ray is imported."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
