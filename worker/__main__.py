"""`python -m worker --model PATH --gateway ENDPOINT`: one worker process."""

import sys

from worker.process import main

sys.exit(main())
