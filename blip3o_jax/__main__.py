"""`python -m blip3o_jax` is the `blip3o` command."""

import sys

from blip3o_jax.cli import main

sys.exit(main())
