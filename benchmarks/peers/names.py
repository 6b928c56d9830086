"""Names of candidates and networks, as the results have them."""

from __future__ import annotations

from medsa_deploy.runtime.backends.registry import DEFAULT

OURS = "medsa-deploy"
DEFAULT_NAME = f"{OURS}, {DEFAULT} fp32"
PLAIN = "plain export, onnxruntime"
"""The candidate that every group has in it, and ratios are to."""
SWIN = "Swin-UNETR, a patch of 96³"
VOLUME_NETWORK = "Demonstration, 3D"
"""What a whole volume's cost is compared with Swin-UNETR's of."""
