"""The policy and other models: settings, checkpoints, quantization, adapters."""
