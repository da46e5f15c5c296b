"""``python -m hf_nmsparse`` is the command ``nmsparse``."""

import sys

from hf_nmsparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
