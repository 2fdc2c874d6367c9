"""What a checkpoint is worth: one file per task, over shared frozen-feature extraction."""
