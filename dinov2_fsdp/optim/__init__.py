"""Parameter groups, schedules and optimizers."""
