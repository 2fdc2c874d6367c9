"""What a run tells its user: meters, clock, metrics.jsonl, TensorBoard, console, logs and its environment."""
