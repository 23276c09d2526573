"""Which experts a text uses: what a model's layers hand out, and numbers about it."""
