"""Makes the support modules of this folder importable and keeps CPU tests to one thread's worth of noise."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
