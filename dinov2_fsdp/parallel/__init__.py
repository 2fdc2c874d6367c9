"""The process world, and how modules are sharded, checkpointed for activations and compiled."""
