import sys

from tokenfusion.cli.main import main

sys.exit(main())
