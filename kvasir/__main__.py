"""The `kvasir` command, and `python -m kvasir`."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C while its modules are loaded ends the process without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as `nohup` wants it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kvasir.cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
