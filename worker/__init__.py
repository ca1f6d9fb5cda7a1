"""One torch process: scheduler, model, sampling. Synchronous, no event loop."""
