"""The bookkeeping of one worker's KV memory: pure Python, except `kv_store`, which holds the tensors."""
