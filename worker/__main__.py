"""`python -m kvasir.worker --model PATH --gateway ENDPOINT`: one worker process."""

import sys

from kvasir.worker.process import main

sys.exit(main())
