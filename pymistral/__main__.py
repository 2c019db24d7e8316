"""``python -m pymistral`` is the command ``pymistral``."""

import sys

from .cli import main

sys.exit(main())
