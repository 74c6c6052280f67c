"""`python -m hnerv_clip.cli`, as `hnerv-clip`."""

import sys

from hnerv_clip.cli import main

sys.exit(main())
