"""What `scripts/vllm_standin.py` is made of: a vLLM server without a model, for tests and benchmarks."""
