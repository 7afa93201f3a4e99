"""Models in one process: learner, SFT loop and generators. No Ray here."""
