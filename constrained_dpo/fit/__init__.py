"""The fit: the Lagrangian maximizer as a LoRA adapter, by TRL's DPOTrainer."""
