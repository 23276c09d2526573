"""Every model type of `transformers` with routed experts: its mixture here against its module there."""
