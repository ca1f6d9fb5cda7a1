"""`python -m kvasir.worker --model PATH --gateway ENDPOINT`: one worker; `--engine vllm` fronts a vLLM server."""

import sys

if "--engine" in sys.argv[1:] or any(arg.startswith("--engine=") for arg in sys.argv[1:]):
    from kvasir.worker.upstream.process import main

    sys.exit(main(sys.argv[1:]))
from kvasir.worker.process import main as serve

sys.exit(serve())
