"""As ``vllm.distributed``."""
