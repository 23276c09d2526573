"""The parity microscope: one batch in two frameworks, compared stage by stage. No torch is imported before a run needs it."""
