"""``bench`` is a folder of the repository, not of the installed package: tests find it through the root."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    # Last, so that an installed gptcore keeps precedence over the sources.
    sys.path.append(str(ROOT))
