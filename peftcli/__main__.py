"""`python -m peftcli` is `peft-train`."""

import sys

try:
    from peftcli.cli import main

    if __name__ == "__main__":
        sys.exit(main())
except KeyboardInterrupt:  # while modules are still being read
    sys.exit(75)
