"""``python -m gptcore`` is ``gptcore``."""

from gptcore.cli.main import main

raise SystemExit(main())
