"""`peft-train`, which `python -m peftcli` is too."""

import sys

try:
    import os
    import signal

    from peftcli import interrupts
except KeyboardInterrupt:
    sys.exit(75)


def main() -> int:
    """Run the words of the command line; interrupted at any moment, it shows no traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts.end_at_once)
    from peftcli import cli

    code = cli.main()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))  # all is done
    return code


if __name__ == "__main__":
    sys.exit(main())
