"""`python -m peftkit`."""

from peftkit.cli import main

raise SystemExit(main())
